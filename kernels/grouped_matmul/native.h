// Grouped products on CPU, read and written where XLA keeps the arrays: what plain and packed matrices share.
//
// Every product c = a b of a group is cut into tasks, a task into panels that lie in the cache in the order in which
// the innermost loop reads them. That loop, `Multiply`, keeps kRows x kVectors vectors of c in registers (the form of
// Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication",
// https://doi.org/10.1145/1356052.1356053). Packing a panel is also where numbers of another format become float32,
// so packed weights are never unpacked as a whole. A few rows (decoding) are bound by reading b once: they go without
// panels, see `Stream`. What was measured: experiments/LOG.md.
//
// Letters: m rows, n columns and k depth of one product; D, F, E and M as in api.py.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "native_panels.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kColumns = kLanes * kVectors;
constexpr int64_t kDepth = 512, kWide = 512 / kColumns * kColumns, kTall = 512;  // cells of a task's panels, at most
constexpr int kFew = 8, kCopies = 24;  // rows of a that Stream takes at most, and cells of a that it copies
constexpr double kWorthAThread = 1e6;  // operations below which waking another thread costs more than it brings

// A stored matrix as the right side of a product.
template <typename Stored>
struct Right {
  Stored matrix;
  Part part;
};

// Rows of x or of a gradient, whose numbers `type` says.
struct Left {
  const void* data;
  ffi::DataType type;
  int64_t columns;
  Part part;
  const float* scales = nullptr;  // of rows of int8

  Left From(int64_t across, int64_t depth) const { return {data, type, columns, part.From(across, depth), scales}; }

  // Calls use(matrix). Cells of several numbers are of one type, floats are read from both.
  template <typename Arithmetic, typename F>
  void As(const F& use) const {
    if constexpr (Arithmetic::kPerCell == 4) return use(Int8{static_cast<const int8_t*>(data), columns, scales});
    else if constexpr (Arithmetic::kPerCell == 2) return use(BFloat16{static_cast<const uint16_t*>(data), columns});
    else if (type == ffi::BF16) return use(BFloat16{static_cast<const uint16_t*>(data), columns});
    else return use(Float32{static_cast<const float*>(data), columns});
  }
};

// Writes the cells of `count` numbers of the first row.
template <typename Arithmetic>
void ReadRow(const Left& left, int64_t count, float* to) {
  constexpr int kNumbers = kLanes * Arithmetic::kPerCell;
  left.As<Arithmetic>([&](const auto& matrix) {
    auto line = Arithmetic::Along(matrix, left.part.row);
    int64_t i = 0, column = left.part.column;
    for (; i + kNumbers <= count; i += kNumbers, to += kLanes) Write(to, line.Load(column + i));
    if (i < count) Write(to, line.Load(column + i, count - i), CellsOf<Arithmetic>(count - i));
  });
}

// Where the sums of a row of a start that is `depth` deep: see Fours.
template <typename Arithmetic>
int32_t StartOf(const Left& left, int64_t depth) {
  if constexpr (Arithmetic::kPerCell < 4) return 0;
  auto codes = static_cast<const int8_t*>(left.data) + left.part.row * left.columns + left.part.column;
  uint32_t sum = 0;  // unsigned, for it may leave int32 on its way
  for (int64_t k = 0; k < depth; ++k) sum += codes[k];
  return static_cast<int32_t>(-128 * sum);
}

// --- Products.

// c = a b for R rows and kColumns columns, or where `starts` is null c += a b.
template <typename Arithmetic, int R>
void Multiply(const float* a, const float* b, int64_t cells, float* c, int64_t c_row, const int32_t* starts) {
  Vector sums[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = starts ? Arithmetic::Start(starts[r]) : Read<Vector>(c + r * c_row + v * kLanes);
  for (int64_t k = 0; k < cells; ++k, a += R, b += kColumns) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Read<Vector>(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Arithmetic::Add(sums[r][v], a + r, right[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Write(c + r * c_row + v * kLanes, sums[r][v]);
}

template <typename Arithmetic, int... R>
void MultiplyRows(int64_t rows, const float* a, const float* b, int64_t cells, float* c, int64_t c_row,
                  const int32_t* starts, std::integer_sequence<int, R...>) {
  static constexpr std::array<decltype(&Multiply<Arithmetic, 1>), kRows> multiply = {Multiply<Arithmetic, R + 1>...};
  multiply[rows - 1](a, b, cells, c, c_row, starts);
}

// c = a b, with m rows of a and c, n columns of b and c, depth k.
template <typename B>
struct Product {
  using Arithmetic = typename ArithmeticOf<B>::Type;
  Left a;
  Right<B> b;
  int64_t m, n, k;
};

// A thread's own memory, aligned to the cache's lines.
float* Memory(int64_t size) {
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), size + 16));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

constexpr int64_t kPanels = kDepth * (kWide + kRows) + kLanes;  // cells that MultiplyPanels packs at a time

// Sums in rows of c_row numbers; done(i, rows) is called when those of `rows` rows from i on are complete. The product
// fits into the panels' memory.
template <typename B, typename Done>
void MultiplyPanels(const Product<B>& p, float* c, int64_t c_row, float* memory, const Done& done) {
  using Arithmetic = typename Product<B>::Arithmetic;
  constexpr int64_t kNumbers = kDepth * Arithmetic::kPerCell;
  float edge[kRows * kColumns], *panels = memory, *panel = memory + kDepth * kWide;
  for (int64_t k = 0; k < p.k; k += kNumbers) {
    int64_t depth = std::min(kNumbers, p.k - k), cells = CellsOf<Arithmetic>(depth);
    int64_t blocks = (p.m + kRows - 1) / kRows;
    Pack<Arithmetic>(p.b.matrix, p.b.part.From(0, k), p.n, depth, kColumns, panels);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t i = p.m * block / blocks, rows = p.m * (block + 1) / blocks - i;
      int32_t starts[kRows];
      for (int64_t r = 0; r < rows && k == 0; ++r) starts[r] = StartOf<Arithmetic>(p.a.From(i + r, 0), p.k);
      p.a.template As<Arithmetic>([&](const auto& matrix) {
        Pack<Arithmetic>(matrix, p.a.part.From(i, k), rows, depth, rows, panel);
      });
      for (int64_t j = 0; j < p.n; j += kColumns) {
        int64_t columns = std::min<int64_t>(kColumns, p.n - j);
        float *to = c + i * c_row + j, *target = columns == kColumns ? to : edge;
        int64_t target_row = columns == kColumns ? c_row : kColumns;
        auto copy = [&](float* into, int64_t into_row, const float* from, int64_t from_row) {
          for (int64_t r = 0; r < rows && into != from; ++r)
            std::memcpy(into + r * into_row, from + r * from_row, columns * sizeof(float));
        };
        copy(target, target_row, to, c_row);
        MultiplyRows<Arithmetic>(rows, panel, panels + j * cells, cells, target, target_row, k > 0 ? nullptr : starts,
                                 std::make_integer_sequence<int, kRows>{});
        copy(to, c_row, target, target_row);
      }
      if (k + kNumbers >= p.k) done(i, rows);
    }
  }
}

// The cells of R rows of a that some cells down b are multiplied with. As many as fit into registers are copied, for no
// write to c can change a copy; more of them would only go from memory to memory.
template <int R, int kSteps>
struct FewCells {
  float cells[R][kSteps] = {};
  FewCells(const float* a, int steps) {
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < steps; ++s) cells[r][s] = a[r * kDepth + s];
  }
  INLINE const float* At(int r, int s) const { return &cells[r][s]; }
};

template <int R>
struct ManyCells {
  const float* a;
  ManyCells(const float* a, int) : a(a) {}
  INLINE const float* At(int r, int s) const { return a + r * kDepth + s; }
};

// Some cells down b, those of a, the sum of each row of these, and where the first sums start.
template <int R, int kSteps, typename Line>
struct Steps {
  std::conditional_t<R * kSteps <= kCopies, FewCells<R, kSteps>, ManyCells<R>> a;
  Line lines[kSteps];
  float totals[R];
  int32_t starts[R];
  int64_t ahead;  // numbers from a row of b to the one that is read kSteps later
};

// Adds kSteps cells down b, each times its cell of a, to kWidth vectors of the R rows of c, or writes them. Where the
// rows of b are of one scale, their codes are added up first; then also the codes' slots in their bytes are known.
template <typename Arithmetic, bool kOneScale, int kWidth, int R, int kSteps, typename Line>
INLINE void StreamSteps(const Steps<R, kSteps, Line>& steps, int64_t column, float* c, int64_t c_row, bool add) {
  Vector sums[R][kWidth];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v)
      sums[r][v] = add && !kOneScale ? Read<Vector>(c + r * c_row + v * kLanes) : Arithmetic::Start(steps.starts[r]);
#pragma GCC unroll 16
  for (int s = 0; s < kSteps; ++s) {
    Vector right[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      if constexpr (kOneScale)
        right[v] = steps.lines[s - s % Line::kPerByte].Code(column + v * kLanes, s % Line::kPerByte);
      else right[v] = steps.lines[s].Load(column + v * kLanes);
      if constexpr (std::is_same_v<Line, Float32::Line>)
        __builtin_prefetch(steps.lines[s].from + column + v * kLanes + steps.ahead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sums[r][v] = Arithmetic::Add(sums[r][v], steps.a.At(r, s), right[v]);
  }
  if constexpr (kOneScale) {
    const Line& line = steps.lines[0];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      Vector scale = line.Scale(column + v * kLanes), before[R];
      if (line.zero_points) {
        Vector zero_point = line.ZeroPoint(column + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r][v] -= steps.totals[r] * zero_point;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) before[r] = add ? Read<Vector>(c + r * c_row + v * kLanes) : Vector{};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r][v] = sums[r][v] * scale + before[r];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) Write(c + r * c_row + v * kLanes, sums[r][v]);
}

// The same at the edges: up to kLanes columns, and as many cells as there are.
template <typename Arithmetic, int R, int kSteps, typename Line>
__attribute__((noinline)) void StreamEdge(Steps<R, kSteps, Line> steps, int cells, int64_t column, int64_t count,
                                          float* c, int64_t c_row, bool add) {
  for (int r = 0; r < R; ++r) {
    Vector sums = add ? Read<Vector>(c + r * c_row, count) : Arithmetic::Start(steps.starts[r]);
    for (int s = 0; s < cells; ++s)
      sums = Arithmetic::Add(sums, steps.a.At(r, s), steps.lines[s].Load(column, count));
    Write(c + r * c_row, sums, count);
  }
}

// c [R, n] = a b for few rows of a: kSteps cells down b at a time pass through the registers, never through memory.
template <int R, typename B>
void Stream(const Product<B>& p, float* c, int64_t c_row, float* memory) {
  using Arithmetic = typename Product<B>::Arithmetic;
  using Line = decltype(Arithmetic::Down(p.b.matrix, 0, 0));
  constexpr int kSteps = B::kHasScales ? 16 : Arithmetic::kSteps, kPerCell = Arithmetic::kPerCell;
  constexpr int64_t kNumbers = kSteps * kPerCell;
  for (int64_t k = 0; k < p.k; k += kNumbers) {
    int64_t rows = std::min<int64_t>(kNumbers, p.k - k), cell = k / kPerCell % kDepth;
    for (int r = 0; r < R && cell == 0; ++r)
      ReadRow<Arithmetic>(p.a.From(r, k), std::min(kDepth * kPerCell, p.k - k), memory + r * kDepth);
    int cells = CellsOf<Arithmetic>(rows);
    Steps<R, kSteps, Line> steps{{memory + cell, cells}};  // no pointer to it is given away, as for FewCells
    for (int r = 0; r < R; ++r) {
      if constexpr (B::kHasScales)
        for (int s = 0; s < cells; ++s) steps.totals[r] += memory[r * kDepth + cell + s];
      if (k == 0) steps.starts[r] = StartOf<Arithmetic>(p.a.From(r, 0), p.k);
    }
    for (int s = 0; s < cells; ++s)
      steps.lines[s] = Arithmetic::Down(p.b.matrix, p.b.part.row + k + s * kPerCell, rows - s * kPerCell);
    steps.ahead = kNumbers * p.b.matrix.columns;
    int64_t j = 0, whole = rows == kNumbers ? p.n : 0, column = p.b.part.column;
    auto stream = [&](auto one_scale) {
      // A cell of a that is read again serves several vectors. Rows of several scales are rare.
      constexpr bool kOneScale = decltype(one_scale)::value;
      constexpr int kWidth = R * kSteps <= kCopies || B::kHasScales != kOneScale ? 1 : kVectors;
      for (; j + kWidth * kLanes <= whole; j += kWidth * kLanes)
        StreamSteps<Arithmetic, kOneScale, kWidth>(steps, column + j, c + j, c_row, k > 0);
    };
    if constexpr (B::kHasScales) {
      if (p.b.part.row % Line::kPerByte == 0 && Line::OneScale(steps.lines[0], steps.lines[kSteps - 1]))
        stream(std::true_type{});
    }
    stream(std::false_type{});
    for (; j < p.n; j += kLanes)
      StreamEdge<Arithmetic>(steps, cells, column + j, std::min<int64_t>(kLanes, p.n - j), c + j, c_row, k > 0);
  }
}

template <typename B, int... R>
void StreamRows(const Product<B>& p, float* c, int64_t c_row, float* memory,
                std::integer_sequence<int, R...>) {
  static constexpr std::array<decltype(&Stream<1, B>), kFew> stream = {Stream<R + 1, B>...};
  stream[p.m - 1](p, c, c_row, memory);
}

template <typename B, typename Done>
void Run(const Product<B>& p, float* c, int64_t c_row, float* memory, const Done& done) {
  if (p.k && (p.m > kFew || !p.b.part.rows_are_depth || p.a.part.rows_are_depth))
    return MultiplyPanels(p, c, c_row, memory, done);
  for (int64_t i = 0; i < p.m && p.k == 0; ++i) std::fill_n(c + i * c_row, p.n, 0.0f);
  if (p.k) StreamRows(p, c, c_row, memory, std::make_integer_sequence<int, kFew>{});
  done(0, p.m);
}

// --- Tasks.

// Calls run(0), ..., run(count - 1) on up to `threads` threads of XLA's. The calling thread works too, so it never
// waits for one to be free; a late one finds nothing left, in memory that lives as long as it.
template <typename F>
void ForEach(ffi::ThreadPool& pool, int64_t threads, int64_t count, const F& run) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, &run] {
    for (int64_t i; (i = progress->next++) < count; progress->done++) run(i);
  };
  for (int64_t helper = 1; helper < std::min(threads, count); ++helper) pool.Schedule(decltype(work)(work));
  work();
  while (progress->done < count) std::this_thread::yield();
}

// A product, and the place in the result's rows where it goes.
template <typename B>
struct Task {
  Product<B> product;
  int64_t row;
  int64_t column = 0;
};

// The result: rows of float32, or of bfloat16 where `half`.
struct Result {
  void* data;
  bool half;
  int64_t rows, columns;

  float* Float(int64_t row, int64_t column) const { return static_cast<float*>(data) + row * columns + column; }
  uint16_t* Half(int64_t row, int64_t column) const { return static_cast<uint16_t*>(data) + row * columns + column; }
};

void WriteRow(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = Bits<uint32_t>(from[i]);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
}

// Makes numbers of a row of sums of integers, in place.
void ScaleRow(float* row, float row_scale, const float* scales, int64_t count) {
  for (int64_t j = 0; j < count; ++j) row[j] = static_cast<float>(Bits<int32_t>(row[j])) * row_scale * scales[j];
}

template <typename B>
void RunAll(ffi::ThreadPool& pool, const std::vector<Task<B>>& groups, const Result& result) {
  std::vector<Task<B>> tasks;
  double operations = 0;
  for (const auto& [p, row, column] : groups) {
    operations += 2.0 * p.m * p.n * p.k;
    // As wide as the panels' memory allows: two threads that touch a new page at the same time hold each other up.
    int64_t cells = CellsOf<typename Product<B>::Arithmetic>(p.k);
    int64_t limit = kDepth * kWide / std::clamp<int64_t>(cells, 1, kDepth) / kColumns * kColumns;
    int64_t wide = std::min(limit, (p.n + kColumns - 1) / kColumns * kColumns);
    int64_t tall = std::min(kTall, kTall * kWide / wide);
    for (int64_t i = 0; i < p.m; i += tall)
      for (int64_t j = 0; j < p.n; j += wide)
        tasks.push_back({{p.a.From(i, 0), {p.b.matrix, p.b.part.From(j, 0)}, std::min(tall, p.m - i),
                          std::min(wide, p.n - j), p.k},
                         row + i, column + j});
  }
  int64_t threads = operations < kWorthAThread ? 1 : pool.num_threads();
  ForEach(pool, threads, tasks.size(), [&](int64_t index) {
    const auto& [p, row, column] = tasks[index];
    float *memory = Memory(kPanels + kTall * kWide), *sums = memory + kPanels;
    if (result.half)
      return Run(p, sums, p.n, memory, [&](int64_t first, int64_t rows) {
        for (int64_t i = first; i < first + rows; ++i) WriteRow(result.Half(row + i, column), sums + i * p.n, p.n);
      });
    Run(p, result.Float(row, column), result.columns, memory, [&](int64_t first, int64_t rows) {
      if constexpr (std::is_same_v<B, Int8>)
        for (int64_t i = first; i < first + rows; ++i)
          ScaleRow(result.Float(row + i, column), p.a.scales[p.a.part.row + i], p.b.matrix.scales + p.b.part.column, p.n);
    });
  });
}

// Each group's first row and its rows. Clipped: sizes that break their bounds must not lead outside the arrays.
std::vector<std::pair<int64_t, int64_t>> Groups(const ffi::AnyBuffer& sizes, int64_t rows) {
  std::vector<std::pair<int64_t, int64_t>> groups;
  int64_t start = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(sizes.element_count()); ++e) {
    int64_t size = std::min<int64_t>(std::max(sizes.typed_data<int32_t>()[e], 0), rows - start);
    groups.emplace_back(start, size);
    start += size;
  }
  return groups;
}

// Whether a size is negative, or all together are more than the rows.
bool BreaksBounds(const ffi::AnyBuffer& sizes, int64_t rows) {
  const int32_t *first = sizes.typed_data<int32_t>(), *last = first + sizes.element_count();
  bool negative = std::any_of(first, last, [](int32_t size) { return size < 0; });
  return negative || std::accumulate(first, last, int64_t{0}) > rows;
}

Left LeftOf(const ffi::AnyBuffer& x, bool rows_are_depth) {
  return {x.untyped_data(), x.element_type(), x.dimensions()[1], {rows_are_depth}};
}

// Where matrices lie one after the other, the result is all their rows.
Result ResultOf(ffi::Result<ffi::AnyBuffer>& result) {
  int64_t columns = result->dimensions().back();
  return {result->untyped_data(), result->element_type() == ffi::BF16,
          static_cast<int64_t>(result->element_count()) / columns, columns};
}

// y[i] = x[i] w[e], or x[i] w[e]^T, for the rows i of each group e; matrix(e) is w[e] as it is stored. Sizes that break
// their bounds make y[0, 0] NaN; not the transposed product, for a gradient belongs to a y that shows it already.
template <typename Matrix>
void RowsTimesMatrices(ffi::ThreadPool& pool, const Left& left, const ffi::AnyBuffer& sizes, bool transposed,
                       const Matrix& matrix, ffi::Result<ffi::AnyBuffer>& result) {
  Result y = ResultOf(result);
  int64_t end = 0;
  std::vector<Task<decltype(matrix(0))>> groups;
  for (auto [start, size] : Groups(sizes, y.rows)) {
    int64_t e = groups.size();
    groups.push_back({{left.From(start, 0), {matrix(e), {!transposed}}, size, y.columns, left.columns}, start});
    end = start + size;
  }
  int64_t rest = (y.rows - end) * y.columns;
  std::memset(y.half ? static_cast<void*>(y.Half(end, 0)) : y.Float(end, 0), 0, rest * (y.half ? 2 : 4));
  RunAll(pool, groups, y);
  if (transposed || !BreaksBounds(sizes, y.rows)) return;
  if (y.half) *y.Half(0, 0) = 0x7fc0;
  else *y.Float(0, 0) = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace
