// Grouped products of int8 rows with int8 matrices, summed in int32; compiled by kernels/native_code.py.
//
// Without the instruction for fours of int8 (AVX512-VNNI), the library has no handler: native.py says so.

#include "native.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

namespace {

// y[i] = scales[i] (codes[i] w[e]) times the scales of w[e]'s columns.
ffi::Error RowsTimesIntegers(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer w_codes,
                             ffi::AnyBuffer w_scales, ffi::AnyBuffer sizes, ffi::Result<ffi::AnyBuffer> result) {
  Left left = LeftOf(codes, false);
  left.scales = scales.typed_data<float>();
  int64_t columns = w_codes.dimensions()[2], size = w_codes.dimensions()[1] * columns;
  auto matrix = [&](int64_t e) {
    return Int8{w_codes.typed_data<int8_t>() + e * size, columns, w_scales.typed_data<float>() + e * columns};
  };
  RowsTimesMatrices(pool, left, sizes, false, matrix, result);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rows_times_integers, RowsTimesIntegers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

#endif
