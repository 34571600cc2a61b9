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
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A vector register, and how many rows and vectors of c fit into the registers beside a row of b.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 14, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 7, kVectors = 3;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif
constexpr int kColumns = kLanes * kVectors;
constexpr int64_t kDepth = 512, kWide = 512 / kColumns * kColumns, kTall = 512;  // of a task's panels, at most
constexpr int kFew = 8, kSteps = 8;  // rows of a that Stream takes at most, and rows of b that it reads at a time
constexpr double kWorthAThread = 1e6;  // operations below which waking another thread costs more than it brings

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

#define INLINE __attribute__((always_inline)) inline

template <typename V, typename T>
INLINE V Read(const T* from, int64_t count = kLanes) {
  V v = {};
  std::memcpy(&v, from, count == kLanes ? sizeof(V) : count * sizeof(T));
  return v;
}

template <typename To, typename From>
INLINE To Bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- Matrices as they are stored: Row(i).Load(column, count) gives `count` numbers of a row, zeros beyond them.

struct Float32 {
  static constexpr bool kHasScales = false;
  const float* data;
  int64_t columns;

  struct Line {
    const float* from;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const { return Read<Vector>(from + column, count); }
  };
  INLINE Line Row(int64_t row) const { return {data + row * columns}; }
};

struct BFloat16 {
  static constexpr bool kHasScales = false;
  const uint16_t* data;
  int64_t columns;

  struct Line {
    const uint16_t* from;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const {
      return Bits<Vector>(__builtin_convertvector(Read<Halves>(from + column, count), Integers) << 16);
    }
  };
  INLINE Line Row(int64_t row) const { return {data + row * columns}; }
};

INLINE void Write(float* to, Vector v, int64_t count = kLanes) {
  std::memcpy(to, &v, count == kLanes ? sizeof(v) : count * sizeof(float));
}

void WriteRow(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = Bits<uint32_t>(from[i]);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
}

// --- Panels.

// Exchanges the bit S of a number's row with that of its lane, in kLanes rows.
template <int S, int... L>
INLINE void ExchangeBit(Vector* rows, std::integer_sequence<int, L...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    Vector a = rows[i], b = rows[i + S];
#if defined(__clang__)
    rows[i] = __builtin_shufflevector(a, b, (L & S ? kLanes + L - S : L)...);
    rows[i + S] = __builtin_shufflevector(a, b, (L & S ? kLanes + L : L + S)...);
#else
    rows[i] = __builtin_shuffle(a, b, Integers{(L & S ? kLanes + L - S : L)...});
    rows[i + S] = __builtin_shuffle(a, b, Integers{(L & S ? kLanes + L : L + S)...});
#endif
  }
}

INLINE void Transpose(Vector* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  ExchangeBit<1>(rows, lanes);
  ExchangeBit<2>(rows, lanes);
  if constexpr (kLanes > 4) ExchangeBit<4>(rows, lanes);
  if constexpr (kLanes > 8) ExchangeBit<8>(rows, lanes);
}

// One side of a product: the part of a stored matrix from (row, column) on. Its stored rows run along the depth, or
// across it, along the product's rows (of a) or columns (of b).
template <typename Stored>
struct Side {
  Stored matrix;
  bool rows_are_depth;
  int64_t row = 0, column = 0;

  Side From(int64_t across, int64_t depth) const {
    Side side = *this;
    side.row += rows_are_depth ? depth : across;
    side.column += rows_are_depth ? across : depth;
    return side;
  }
};

template <bool kPanels, typename Stored>
INLINE void PackRows(const Side<Stored>& side, int64_t across, int64_t depth, int64_t width, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    auto line = side.matrix.Row(side.row + k);
    for (int64_t panel = 0; panel < across; panel += kPanels ? width : across)
      for (int64_t i = 0; i < (kPanels ? std::min(width, across - panel) : across); i += kLanes) {
        int64_t column = side.column + panel + i, stored = side.matrix.columns - column;
        Write(to + panel * depth + k * width + i, stored >= kLanes ? line.Load(column) : line.Load(column, stored));
      }
  }
}

// Writes panels of `width` numbers across and `depth` deep, together `across` wide. A vector may reach past a panel's
// width, into what is written next; so the memory needs a vector's room at its end.
template <typename Stored>
void Pack(const Side<Stored>& side, int64_t across, int64_t depth, int64_t width, float* to) {
  if (side.rows_are_depth) return across > width ? PackRows<true>(side, across, depth, width, to)
                                                 : PackRows<false>(side, across, depth, width, to);
  for (int64_t i = 0; i < across; i += kLanes) {
    int64_t place = i % width, lanes = place ? std::min<int64_t>(kLanes, width - place) : kLanes;
    float* panel = to + i / width * depth * width + place;  // what was written before it must stay
    decltype(side.matrix.Row(0)) lines[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) lines[r] = side.matrix.Row(side.row + std::min(i + r, across - 1));
    for (int64_t k = 0; k < depth; k += kLanes, panel += kLanes * width) {
      int64_t column = side.column + k, count = std::min<int64_t>(kLanes, depth - k);
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) rows[r] = count == kLanes ? lines[r].Load(column) : lines[r].Load(column, count);
      Transpose(rows);
      if (count == kLanes && lanes == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) Write(panel + r * width, rows[r]);
      } else {
        for (int64_t r = 0; r < count; ++r) Write(panel + r * width, rows[r], lanes);
      }
    }
  }
}

// Rows of x or of a gradient, from (row, column) on: float32, or bfloat16 where `half`.
struct Left {
  const void* data;
  bool half;
  int64_t columns;
  bool rows_are_depth;
  int64_t row = 0, column = 0;

  template <typename F>
  auto As(const F& use) const {
    if (half) return use(Side<BFloat16>{{static_cast<const uint16_t*>(data), columns}, rows_are_depth, row, column});
    return use(Side<Float32>{{static_cast<const float*>(data), columns}, rows_are_depth, row, column});
  }
  Left From(int64_t across, int64_t depth) const {
    return As([&](auto side) {
      side = side.From(across, depth);
      return Left{data, half, columns, rows_are_depth, side.row, side.column};
    });
  }
};

void ReadRow(const Left& left, int64_t count, float* to) {
  constexpr int kPart = kSteps < kLanes ? kSteps : kLanes;  // a copy of constant size is a move between registers
  left.As([&](const auto& side) {
    auto line = side.matrix.Row(side.row);
    int64_t i = 0;
    for (; i + kPart <= count; i += kPart) Write(to + i, line.Load(side.column + i, kPart), kPart);
    if (i < count) Write(to + i, line.Load(side.column + i, count - i), count - i);
  });
}

// --- Products.

template <int R>
void Multiply(const float* a, const float* b, int64_t depth, float* c, int64_t c_row, bool add) {
  Vector sum[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? Read<Vector>(c + r * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k, a += R, b += kColumns) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Read<Vector>(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r] * right[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Write(c + r * c_row + v * kLanes, sum[r][v]);
}

template <int... R>
void MultiplyRows(int64_t rows, const float* a, const float* b, int64_t depth, float* c, int64_t c_row, bool add,
                  std::integer_sequence<int, R...>) {
  static constexpr std::array<decltype(&Multiply<1>), kRows> multiply = {Multiply<R + 1>...};
  multiply[rows - 1](a, b, depth, c, c_row, add);
}

// c = a b, with m rows of a and c, n columns of b and c, depth k.
template <typename B>
struct Product {
  Left a;
  Side<B> b;
  int64_t m, n, k;
};

// A thread's own memory, aligned to the cache's lines.
float* Memory(int64_t size) {
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), size + 16));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

constexpr int64_t kPanels = kDepth * (kWide + kRows) + kLanes;  // numbers that MultiplyPanels packs at a time

// c in rows of c_row numbers; n fits into the panels' memory.
template <typename B>
void MultiplyPanels(const Product<B>& p, float* c, int64_t c_row, float* memory) {
  float edge[kRows * kColumns], *panels = memory, *panel = memory + kDepth * kWide;
  for (int64_t k = 0; k < p.k; k += kDepth) {
    int64_t depth = std::min(kDepth, p.k - k), blocks = (p.m + kRows - 1) / kRows;
    Pack(p.b.From(0, k), p.n, depth, kColumns, panels);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t i = p.m * block / blocks, rows = p.m * (block + 1) / blocks - i;
      p.a.From(i, k).As([&](const auto& side) { Pack(side, rows, depth, rows, panel); });
      for (int64_t j = 0; j < p.n; j += kColumns) {
        int64_t columns = std::min<int64_t>(kColumns, p.n - j);
        float *to = c + i * c_row + j, *target = columns == kColumns ? to : edge;
        int64_t target_row = columns == kColumns ? c_row : kColumns;
        auto copy = [&](float* into, int64_t into_row, const float* from, int64_t from_row) {
          for (int64_t r = 0; r < rows && into != from; ++r)
            std::memcpy(into + r * into_row, from + r * from_row, columns * sizeof(float));
        };
        copy(target, target_row, to, c_row);
        MultiplyRows(rows, panel, panels + j * depth, depth, target, target_row, k > 0,
                     std::make_integer_sequence<int, kRows>{});
        copy(to, c_row, target, target_row);
      }
    }
  }
}

// Some rows of b, and the columns of R rows of a that they are multiplied with.
template <int R, typename Line>
struct Steps {
  float a[R][kSteps];
  Line lines[kSteps];
};

// Adds kSteps rows of b, each times its column of a, to kLanes columns of the R rows of c, or writes them. Where the
// rows of b are of one scale, their codes are added up first.
template <bool kOneScale, int R, typename Line>
INLINE void StreamSteps(const Steps<R, Line>& steps, int64_t column, float* c, int64_t c_row, bool add) {
  Vector sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = add && !kOneScale ? Read<Vector>(c + r * c_row) : Vector{};
#pragma GCC unroll 16
  for (int s = 0; s < kSteps; ++s) {
    Vector right;
    if constexpr (kOneScale) right = steps.lines[s].Code(column);
    else right = steps.lines[s].Load(column);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] += steps.a[r][s] * right;
  }
  if constexpr (kOneScale) {
    Vector scale = steps.lines[0].Scale(column);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = sum[r] * scale + (add ? Read<Vector>(c + r * c_row) : Vector{});
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) Write(c + r * c_row, sum[r]);
}

// The same at the edges: `count` columns and as many rows of b as there are.
template <int R, typename Line>
__attribute__((noinline)) void StreamEdge(Steps<R, Line> steps, int rows, int64_t column, int64_t count, float* c,
                                          int64_t c_row, bool add) {
  for (int r = 0; r < R; ++r) {
    Vector sum = add ? Read<Vector>(c + r * c_row, count) : Vector{};
    for (int s = 0; s < rows; ++s) sum += steps.a[r][s] * steps.lines[s].Load(column, count);
    Write(c + r * c_row, sum, count);
  }
}

// c [R, n] = a b for few rows of a: kSteps rows of b at a time pass through the registers, never through memory.
template <int R, typename B>
void Stream(const Product<B>& p, float* c, int64_t c_row) {
  using Line = decltype(p.b.matrix.Row(0));
  for (int64_t k = 0; k < p.k; k += kSteps) {
    int rows = std::min<int64_t>(kSteps, p.k - k);
    Steps<R, Line> steps;  // no pointer to it is given away, so no write to c can change it: it may stay in registers
    for (int r = 0; r < R; ++r) {
      float row[kSteps];
      ReadRow(p.a.From(r, k), rows, row);
      for (int s = 0; s < rows; ++s) steps.a[r][s] = row[s];
    }
    for (int s = 0; s < rows; ++s) steps.lines[s] = p.b.matrix.Row(p.b.row + k + s);
    int64_t j = 0, whole = rows == kSteps ? p.n / kLanes * kLanes : 0;
    if constexpr (B::kHasScales)
      if (whole && Line::OneScale(steps.lines[0], steps.lines[kSteps - 1]))
        for (; j < whole; j += kLanes) StreamSteps<true>(steps, p.b.column + j, c + j, c_row, k > 0);
    for (; j < whole; j += kLanes) StreamSteps<false>(steps, p.b.column + j, c + j, c_row, k > 0);
    for (; j < p.n; j += kLanes)
      StreamEdge(steps, rows, p.b.column + j, std::min<int64_t>(kLanes, p.n - j), c + j, c_row, k > 0);
  }
}

template <typename B, int... R>
void StreamRows(const Product<B>& p, float* c, int64_t c_row, std::integer_sequence<int, R...>) {
  static constexpr std::array<decltype(&Stream<1, B>), kFew> stream = {Stream<R + 1, B>...};
  stream[p.m - 1](p, c, c_row);
}

template <typename B>
void Run(const Product<B>& p, float* c, int64_t c_row, float* memory) {
  if (p.m <= kFew && p.b.rows_are_depth && !p.a.rows_are_depth)
    return StreamRows(p, c, c_row, std::make_integer_sequence<int, kFew>{});
  for (int64_t i = 0; i < p.m && p.k == 0; ++i) std::fill_n(c + i * c_row, p.n, 0.0f);
  MultiplyPanels(p, c, c_row, memory);
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

template <typename B>
void RunAll(ffi::ThreadPool& pool, const std::vector<Task<B>>& groups, const Result& result) {
  std::vector<Task<B>> tasks;
  double operations = 0;
  for (const auto& [p, row, column] : groups) {
    operations += 2.0 * p.m * p.n * p.k;
    // As wide as the panels' memory allows: two threads that touch a new page at the same time hold each other up.
    int64_t limit = kDepth * kWide / std::clamp<int64_t>(p.k, 1, kDepth) / kColumns * kColumns;
    int64_t wide = std::min(limit, (p.n + kColumns - 1) / kColumns * kColumns);
    int64_t tall = std::min(kTall, kTall * kWide / wide);
    for (int64_t i = 0; i < p.m; i += tall)
      for (int64_t j = 0; j < p.n; j += wide)
        tasks.push_back({{p.a.From(i, 0), p.b.From(j, 0), std::min(tall, p.m - i), std::min(wide, p.n - j), p.k},
                         row + i, column + j});
  }
  int64_t threads = operations < kWorthAThread ? 1 : pool.num_threads();
  ForEach(pool, threads, tasks.size(), [&](int64_t index) {
    const auto& [p, row, column] = tasks[index];
    float *memory = Memory(kPanels + kTall * kWide), *sums = memory + kPanels;
    if (!result.half) return Run(p, result.Float(row, column), result.columns, memory);
    Run(p, sums, p.n, memory);
    for (int64_t i = 0; i < p.m; ++i) WriteRow(result.Half(row + i, column), sums + i * p.n, p.n);
  });
}

// Each group's first row and its rows. Clipped: sizes that break their bounds, which the caller reports, must not lead
// outside the arrays.
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

Left LeftOf(const ffi::AnyBuffer& x, bool rows_are_depth) {
  return {x.untyped_data(), x.element_type() == ffi::BF16, x.dimensions()[1], rows_are_depth};
}

// Where matrices lie one after the other, the result is all their rows.
Result ResultOf(ffi::Result<ffi::AnyBuffer>& result) {
  int64_t columns = result->dimensions().back();
  return {result->untyped_data(), result->element_type() == ffi::BF16,
          static_cast<int64_t>(result->element_count()) / columns, columns};
}

// y[i] = x[i] w[e], or x[i] w[e]^T, for the rows i of each group e; matrix(e) is w[e] as it is stored.
template <typename Matrix>
void RowsTimesMatrices(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& sizes, bool transposed,
                       const Matrix& matrix, ffi::Result<ffi::AnyBuffer>& result) {
  Left left = LeftOf(x, false);
  Result y = ResultOf(result);
  int64_t end = 0;
  std::vector<Task<decltype(matrix(0))>> groups;
  for (auto [start, size] : Groups(sizes, y.rows)) {
    int64_t e = groups.size();
    groups.push_back({{left.From(start, 0), {matrix(e), !transposed}, size, y.columns, left.columns}, start});
    end = start + size;
  }
  int64_t rest = (y.rows - end) * y.columns;
  std::memset(y.half ? static_cast<void*>(y.Half(end, 0)) : y.Float(end, 0), 0, rest * (y.half ? 2 : 4));
  RunAll(pool, groups, y);
}

}  // namespace
