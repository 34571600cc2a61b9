// Grouped products of float32 or bfloat16 matrices, and their gradients; compiled by kernels/native_code.py.

#include "native.h"

namespace {

template <typename A>
void PlainMatrices(ffi::ThreadPool& pool, bool transposed, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
                   const ffi::AnyBuffer& sizes, ffi::Result<ffi::AnyBuffer>& result) {
  int64_t inner = w.dimensions()[1], width = w.dimensions()[2];
  auto data = static_cast<const Number<A>*>(w.untyped_data());
  auto matrix = [=](int64_t e) { return A{data + e * inner * width, width}; };
  RowsTimesMatrices<A>(pool, x, sizes, transposed, matrix, result);
}

// dw[e] = x_e^T dy_e.
template <typename A>
void GradientOfMatrices(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy,
                              const ffi::AnyBuffer& sizes, ffi::Result<ffi::AnyBuffer>& result) {
  using Float = Number<A>;
  int64_t inner = x.dimensions()[1], width = dy.dimensions()[1];
  A left{static_cast<const Float*>(x.untyped_data()), inner}, right{static_cast<const Float*>(dy.untyped_data()), width};
  Float* dw = static_cast<Float*>(result->untyped_data());
  std::vector<Task<A, A, Float>> groups;
  for (auto [start, size] : Groups(sizes, x.dimensions()[0])) {
    int64_t e = groups.size();
    groups.push_back({{{left, true, start}, {right, true, start}, inner, width, size}, dw + e * inner * width});
  }
  RunAll(pool, groups, width);
}

// --- What XLA calls. Shapes and types were checked in Python.

ffi::Error RowsTimes(ffi::ThreadPool pool, bool transposed, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                     ffi::Result<ffi::AnyBuffer> result) {
  auto run = x.element_type() == ffi::F32 ? PlainMatrices<Float32> : PlainMatrices<BFloat16>;
  run(pool, transposed, x, w, sizes, result);
  return ffi::Error::Success();
}

ffi::Error Gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer sizes,
                    ffi::Result<ffi::AnyBuffer> result) {
  auto run = x.element_type() == ffi::F32 ? GradientOfMatrices<Float32> : GradientOfMatrices<BFloat16>;
  run(pool, x, dy, sizes, result);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rows_times_matrices, RowsTimes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("transposed")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gradient_of_matrices, Gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
