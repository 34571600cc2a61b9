// Grouped products of float32 or bfloat16 matrices, and their gradients; compiled by kernels/native_code.py.

#include "native.h"

namespace {

template <typename Stored>
Stored Matrix(const ffi::AnyBuffer& buffer, int64_t first = 0) {
  return {static_cast<decltype(Stored::data)>(buffer.untyped_data()) + first, buffer.dimensions().back()};
}

template <typename Stored>
void Products(ffi::ThreadPool& pool, bool transposed, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
              const ffi::AnyBuffer& sizes, ffi::Result<ffi::AnyBuffer>& result) {
  int64_t size = w.dimensions()[1] * w.dimensions()[2];
  auto matrix = [&](int64_t e) { return Matrix<Stored>(w, e * size); };
  RowsTimesMatrices(pool, LeftOf(x, false), sizes, transposed, matrix, result);
}

// dw[e] = x_e^T dy_e.
template <typename Stored>
void Gradients(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy, const ffi::AnyBuffer& sizes,
               ffi::Result<ffi::AnyBuffer>& result) {
  Left left = LeftOf(x, true);
  Stored right = Matrix<Stored>(dy);
  Result dw = ResultOf(result);
  std::vector<Task<Stored>> groups;
  for (auto [start, size] : Groups(sizes, x.dimensions()[0])) {
    int64_t e = groups.size();
    groups.push_back({{left.From(0, start), {right, {true, start}}, left.columns, dw.columns, size}, e * left.columns});
  }
  RunAll(pool, groups, dw);
}

// --- What XLA calls. Shapes and types were checked in Python.

ffi::Error RowsTimes(ffi::ThreadPool pool, bool transposed, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                     ffi::Result<ffi::AnyBuffer> result) {
  auto run = x.element_type() == ffi::F32 ? Products<Float32> : Products<BFloat16>;
  run(pool, transposed, x, w, sizes, result);
  return ffi::Error::Success();
}

ffi::Error Gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer sizes,
                    ffi::Result<ffi::AnyBuffer> result) {
  auto run = x.element_type() == ffi::F32 ? Gradients<Float32> : Gradients<BFloat16>;
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
