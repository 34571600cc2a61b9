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
constexpr int kFew = 8, kSteps = 8;  // rows that go without panels, and the rows of b that they read at a time,
constexpr int64_t kDeepest = (kDepth * kWide - kSteps) / kFew;  // as long as they fit into the panels' memory
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
  const float* data;
  int64_t columns;

  struct Line {
    const float* from;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const { return Read<Vector>(from + column, count); }
  };
  INLINE Line Row(int64_t row) const { return {data + row * columns}; }
};

struct BFloat16 {
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

// Writes panels of `width` numbers across and `depth` deep, together `across` wide. A vector may reach past a panel's
// width, into what is written next; so the memory needs a vector's room at its end.
template <typename Stored>
void Pack(const Side<Stored>& side, int64_t across, int64_t depth, int64_t width, float* to) {
  if (side.rows_are_depth) {
    for (int64_t k = 0; k < depth; ++k) {
      auto line = side.matrix.Row(side.row + k);
      for (int64_t panel = 0; panel < across; panel += width)
        for (int64_t i = 0; i < std::min(width, across - panel); i += kLanes) {
          int64_t column = side.column + panel + i, stored = side.matrix.columns - column;
          Write(to + panel * depth + k * width + i, stored >= kLanes ? line.Load(column) : line.Load(column, stored));
        }
    }
    return;
  }
  for (int64_t i = 0; i < across; i += kLanes) {
    float* panel = to + i / width * depth * width + i % width;
    decltype(side.matrix.Row(0)) lines[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) lines[r] = side.matrix.Row(side.row + std::min(i + r, across - 1));
    for (int64_t k = 0; k < depth; k += kLanes, panel += kLanes * width) {
      int64_t column = side.column + k, count = std::min<int64_t>(kLanes, depth - k);
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) rows[r] = count == kLanes ? lines[r].Load(column) : lines[r].Load(column, count);
      Transpose(rows);
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) Write(panel + r * width, rows[r]);
      } else {
        for (int64_t r = 0; r < count; ++r) Write(panel + r * width, rows[r]);
      }
    }
  }
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

template <typename A, typename B>
struct Product {
  Side<A> a;
  Side<B> b;
  int64_t m, n, k;
};

// A thread's own memory, aligned to the cache's lines.
float* Memory(int64_t size) {
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), size + 16));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// c [m, n] = a b, in rows of c_row numbers. m and n are at most kTall and kWide.
template <typename A, typename B, int... R>
void MultiplyPanels(const Product<A, B>& p, float* c, int64_t c_row, float* memory, std::integer_sequence<int, R...>) {
  constexpr std::array<decltype(&Multiply<1>), kRows> multiply = {Multiply<R + 1>...};
  float edge[kRows * kColumns], *panels = memory, *panel = memory + kDepth * kWide;
  for (int64_t k = 0; k < p.k; k += kDepth) {
    int64_t depth = std::min(kDepth, p.k - k), blocks = (p.m + kRows - 1) / kRows;
    Pack(p.b.From(0, k), p.n, depth, kColumns, panels);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t i = p.m * block / blocks, rows = p.m * (block + 1) / blocks - i;
      Pack(p.a.From(i, k), rows, depth, rows, panel);
      for (int64_t j = 0; j < p.n; j += kColumns) {
        int64_t columns = std::min<int64_t>(kColumns, p.n - j);
        float* to = c + i * c_row + j;
        if (columns == kColumns) {
          multiply[rows - 1](panel, panels + j * depth, depth, to, c_row, k > 0);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) std::memcpy(edge + r * kColumns, to + r * c_row, columns * sizeof(float));
        multiply[rows - 1](panel, panels + j * depth, depth, edge, kColumns, k > 0);
        for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * c_row, edge + r * kColumns, columns * sizeof(float));
      }
    }
  }
}

// c [R, n] = a b, for R rows a of `depth` numbers: adds kSteps rows of b at a time, each times its column of a.
template <int R, typename B>
void Stream(const Side<B>& b, int64_t n, int64_t depth, const float* a, float* c, int64_t c_row) {
  for (int64_t k = 0; k < depth; k += kSteps) {
    int64_t steps = std::min<int64_t>(kSteps, depth - k);
    float left[R][kSteps];  // a copy that no write to c can change, so it may stay in registers
    decltype(b.matrix.Row(0)) lines[kSteps];
    for (int64_t s = 0; s < steps; ++s) {
      lines[s] = b.matrix.Row(b.row + k + s);
      for (int r = 0; r < R; ++r) left[r][s] = a[r * depth + k + s];
    }
    auto columns = [&](int64_t j, int64_t count, int64_t steps) __attribute__((always_inline)) {
      Vector sum[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = k ? Read<Vector>(c + r * c_row + j, count) : Vector{};
#pragma GCC unroll 16
      for (int s = 0; s < steps; ++s) {
        Vector right = lines[s].Load(b.column + j, count);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r] += left[r][s] * right;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) Write(c + r * c_row + j, sum[r], count);
    };
    int64_t whole = steps == kSteps ? n / kLanes * kLanes : 0;  // columns in which all sizes are constants
    for (int64_t j = 0; j < whole; j += kLanes) columns(j, kLanes, kSteps);
    for (int64_t j = whole; j < n; j += kLanes)
      columns(j, std::min<int64_t>(kLanes, n - j), steps);
  }
}

template <typename A, typename B, int... R>
void StreamRows(const Product<A, B>& p, float* c, int64_t c_row, float* memory, std::integer_sequence<int, R...>) {
  constexpr std::array<decltype(&Stream<1, B>), kFew> stream = {Stream<R + 1, B>...};
  for (int64_t r = 0; r < p.m; ++r)
    for (int64_t k = 0; k < p.k; k += kLanes) {
      int64_t count = std::min<int64_t>(kLanes, p.k - k);
      Write(memory + r * p.k + k, p.a.matrix.Row(p.a.row + r).Load(p.a.column + k, count), count);
    }
  stream[p.m - 1](p.b, p.n, p.k, memory, c, c_row);
}

template <typename A, typename B>
void Run(const Product<A, B>& p, float* c, int64_t c_row, float* memory) {
  if (p.m <= kFew && p.k <= kDeepest && p.b.rows_are_depth && !p.a.rows_are_depth)
    return StreamRows(p, c, c_row, memory, std::make_integer_sequence<int, kFew>{});
  MultiplyPanels(p, c, c_row, memory, std::make_integer_sequence<int, kRows>{});
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

// A product of one group, and where its result goes: rows of `c_row` numbers of type C.
template <typename A, typename B, typename C>
struct Task {
  Product<A, B> product;
  C* c;
};

template <typename A, typename B, typename C>
void RunAll(ffi::ThreadPool& pool, const std::vector<Task<A, B, C>>& groups, int64_t c_row) {
  std::vector<Task<A, B, C>> tasks;
  double operations = 0;
  for (const auto& [p, c] : groups) {
    operations += 2.0 * p.m * p.n * p.k;
    for (int64_t i = 0; i < p.m; i += kTall)
      for (int64_t j = 0; j < p.n; j += kWide)
        tasks.push_back({{p.a.From(i, 0), p.b.From(j, 0), std::min(kTall, p.m - i), std::min(kWide, p.n - j), p.k},
                         c + i * c_row + j});
  }
  int64_t threads = operations < kWorthAThread ? 1 : pool.num_threads();
  ForEach(pool, threads, tasks.size(), [&](int64_t index) {
    const auto& [p, c] = tasks[index];
    float* memory = Memory(kDepth * (kWide + kRows) + kLanes + kTall * kWide);
    float* sums = memory + kDepth * (kWide + kRows) + kLanes;
    constexpr bool direct = std::is_same_v<C, float>;
    float* to = direct ? reinterpret_cast<float*>(c) : sums;
    int64_t to_row = direct ? c_row : p.n;
    if (p.k == 0)
      for (int64_t i = 0; i < p.m; ++i) std::fill_n(to + i * to_row, p.n, 0.0f);
    else
      Run(p, to, to_row, memory);
    if constexpr (!direct)
      for (int64_t i = 0; i < p.m; ++i) WriteRow(c + i * c_row, sums + i * p.n, p.n);
  });
}

// Each group's first row and its rows. Clipped: sizes that break their bounds, which the caller reports, must not lead
// outside the arrays.
std::vector<std::pair<int64_t, int64_t>> Groups(const ffi::AnyBuffer& sizes, int64_t rows) {
  std::vector<std::pair<int64_t, int64_t>> groups;
  int64_t start = 0;
  for (int64_t e = 0; e < sizes.dimensions()[0]; ++e) {
    int64_t size = std::min<int64_t>(std::max(sizes.typed_data<int32_t>()[e], 0), rows - start);
    groups.emplace_back(start, size);
    start += size;
  }
  return groups;
}

template <typename Stored>
using Number = std::remove_const_t<std::remove_pointer_t<decltype(Stored::data)>>;

// y[i] = x[i] w[e], or x[i] w[e]^T, for the rows i of each group e; matrix(e) is w[e] as it is stored.
template <typename A, typename Matrix>
void RowsTimesMatrices(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& sizes, bool transposed,
                       const Matrix& matrix, ffi::Result<ffi::AnyBuffer>& result) {
  using Float = Number<A>;
  int64_t rows = x.dimensions()[0], inner = x.dimensions()[1], width = result->dimensions()[1], end = 0;
  A left{static_cast<const Float*>(x.untyped_data()), inner};
  Float* y = static_cast<Float*>(result->untyped_data());
  std::vector<Task<A, decltype(matrix(0)), Float>> groups;
  for (auto [start, size] : Groups(sizes, rows)) {
    int64_t e = groups.size();
    groups.push_back({{{left, false, start}, {matrix(e), !transposed}, size, width, inner}, y + start * width});
    end = start + size;
  }
  std::fill(y + end * width, y + rows * width, Float{});
  RunAll(pool, groups, width);
}

}  // namespace
