// Matrices as they are stored, and the panels that products are made of: for every CPU, format and arithmetic.
//
// A panel is made of cells of 32 bits, which hold neighbours along the depth: one float32, and where the CPU has an
// instruction for their products, two bfloat16 or four int8. So all three go through the same loops, and each packs and
// multiplies as its struct of "Arithmetic" says. Letters: see native.h.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

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

typedef float Vector __attribute__((vector_size(kLanes * 4)));  // or as many cells of any arithmetic
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef int16_t SignedHalves __attribute__((vector_size(kLanes * 2)));

#define INLINE __attribute__((always_inline)) inline

template <typename V, typename T>
INLINE V Read(const T* from, int64_t count = kLanes) {
  V v = {};
  std::memcpy(&v, from, count == kLanes ? sizeof(V) : count * sizeof(T));
  return v;
}

INLINE void Write(float* to, Vector v, int64_t count = kLanes) {
  std::memcpy(to, &v, count == kLanes ? sizeof(v) : count * sizeof(float));
}

template <typename To, typename From>
INLINE To Bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Integers of 8 or 16 bits, one to a lane. By the instructions' names, for GCC 12 would take each vector apart.
INLINE Integers Wide(Bytes bytes) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(Bits<int64_t>(bytes)));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, Halves), Integers);
#endif
}

INLINE Integers Wide(Halves halves) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, Integers);
#endif
}

INLINE Integers Signed(Bytes bytes) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(Bits<int64_t>(bytes)));
#else
  return __builtin_convertvector(__builtin_convertvector(Bits<SignedBytes>(bytes), SignedHalves), Integers);
#endif
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
      return Bits<Vector>(Wide(Read<Halves>(from + column, count)) << 16);
    }
  };
  INLINE Line Row(int64_t row) const { return {data + row * columns}; }
};

struct Int8 {
  static constexpr bool kHasScales = false;
  const int8_t* data;
  int64_t columns;
  const float* scales;  // of rows of a, of columns of b
};

// --- Arithmetic. Down(matrix, row, rows) reads cells out of the next `rows` stored rows, or as many as a cell holds;
// Along(matrix, row, column, count) reads them out of `count` numbers of one row.

struct Floats {
  static constexpr int kPerCell = 1;
  static constexpr int kSteps = 8;

  template <typename Stored>
  static INLINE auto Down(const Stored& matrix, int64_t row, int64_t) {
    return matrix.Row(row);
  }
  template <typename Stored>
  static INLINE auto Along(const Stored& matrix, int64_t row) {
    return matrix.Row(row);
  }
  static INLINE Vector Start(int32_t) { return Vector{}; }
  static INLINE Vector Add(Vector sums, const float* a, Vector b) { return sums + *a * b; }
};

// Cells as they lie in a stored row.
template <typename Number, int kPerCell>
struct Cells {
  const Number* from;
  INLINE Vector Load(int64_t column, int64_t count = kLanes * kPerCell) const {
    Vector cells = {};
    std::memcpy(&cells, from + column, count == kLanes * kPerCell ? sizeof(cells) : count * sizeof(Number));
    return cells;
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, summed in float32. The instruction takes numbers below float32's normal ones for zero.
struct Pairs {
  static constexpr int kPerCell = 2;
  static constexpr int kSteps = 8;

  struct TwoRows {
    const uint16_t* from;
    int64_t columns;
    bool both;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const {
      Integers cells = Wide(Read<Halves>(from + column, count));
      return Bits<Vector>(both ? cells | Wide(Read<Halves>(from + column + columns, count)) << 16 : cells);
    }
  };
  static INLINE TwoRows Down(const BFloat16& matrix, int64_t row, int64_t rows) {
    return {matrix.data + row * matrix.columns, matrix.columns, rows > 1};
  }
  static INLINE Cells<uint16_t, 2> Along(const BFloat16& matrix, int64_t row) {
    return {matrix.data + row * matrix.columns};
  }
  static INLINE Vector Start(int32_t) { return Vector{}; }
  static INLINE Vector Add(Vector sums, const float* a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)b, (__m512bh)_mm512_set1_ps(*a));
  }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Fours of int8, summed in int32, exactly as far as int32 goes. The instruction wants the codes of one side without
// signs: those of b get 128 more each, so sums start at -128 times the sum of a's row.
struct Fours {
  static constexpr int kPerCell = 4;
  static constexpr int kSteps = 4;

  struct FourRows {
    const int8_t* from;
    int64_t columns;
    int rows;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const {
      // What stands for rows that are not there is multiplied with zeros of a.
      const int8_t *first = from + column, *second = first + (rows > 1) * columns;
      const int8_t *third = second + (rows > 2) * columns, *fourth = third + (rows > 3) * columns;
      __m512i bytes = _mm512_castsi128_si512(Read<__m128i>(first, count));
      bytes = _mm512_inserti32x4(bytes, Read<__m128i>(second, count), 1);
      bytes = _mm512_inserti32x4(bytes, Read<__m128i>(third, count), 2);
      bytes = _mm512_inserti32x4(bytes, Read<__m128i>(fourth, count), 3);
      // Four columns of all rows to each quarter of the register, then a column's four bytes together.
      const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m128i columns_of_quarter = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      bytes = _mm512_permutexvar_epi32(quarters, bytes);
      bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(columns_of_quarter));
      return (Vector)_mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
    }
  };
  static INLINE FourRows Down(const Int8& matrix, int64_t row, int64_t rows) {
    return {matrix.data + row * matrix.columns, matrix.columns, static_cast<int>(std::min<int64_t>(rows, 4))};
  }
  static INLINE Cells<int8_t, 4> Along(const Int8& matrix, int64_t row) {
    return {matrix.data + row * matrix.columns};
  }
  static INLINE Vector Start(int32_t start) { return Bits<Vector>(Integers{} + start); }
  static INLINE Vector Add(Vector sums, const float* a, Vector b) {
    return (Vector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)b, (__m512i)_mm512_set1_ps(*a));
  }
};
#endif

// What the products with a stored b are made of.
template <typename Stored>
struct ArithmeticOf {
  using Type = Floats;
};
#if defined(__AVX512BF16__)
template <>
struct ArithmeticOf<BFloat16> {
  using Type = Pairs;
};
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <>
struct ArithmeticOf<Int8> {
  using Type = Fours;
};
#endif

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

template <typename Arithmetic>
constexpr int64_t CellsOf(int64_t depth) {
  return (depth + Arithmetic::kPerCell - 1) / Arithmetic::kPerCell;
}

// The part of a stored matrix from (row, column) on, as a side of a product. Its stored rows run along the depth, or
// across it, along the product's rows (of a) or columns (of b).
struct Part {
  bool rows_are_depth;
  int64_t row = 0, column = 0;

  Part From(int64_t across, int64_t depth) const {
    return rows_are_depth ? Part{true, row + depth, column + across} : Part{false, row + across, column + depth};
  }
};

// Writes panels of `width` cells across and as deep as `depth` numbers take, together `across` wide.
template <typename Arithmetic, bool kPanels, typename Stored>
INLINE void PackRows(Stored matrix, Part part, int64_t across, int64_t depth, int64_t width, float* to) {
  int64_t cells = CellsOf<Arithmetic>(depth);
  for (int64_t cell = 0; cell < cells; ++cell) {
    int64_t k = cell * Arithmetic::kPerCell;
    auto line = Arithmetic::Down(matrix, part.row + k, depth - k);
    for (int64_t panel = 0; panel < across; panel += kPanels ? width : across)
      for (int64_t i = 0; i < (kPanels ? std::min(width, across - panel) : across); i += kLanes) {
        int64_t column = part.column + panel + i, stored = matrix.columns - column;
        Write(to + panel * cells + cell * width + i, stored >= kLanes ? line.Load(column) : line.Load(column, stored));
      }
  }
}

// The same of rows that run across, in squares of cells.
template <typename Arithmetic, typename Stored>
INLINE void PackColumns(Stored matrix, Part part, int64_t across, int64_t depth, int64_t width,
                        float* to) {
  constexpr int kPerCell = Arithmetic::kPerCell, kPerVector = kLanes * kPerCell;
  int64_t cells = CellsOf<Arithmetic>(depth);
  for (int64_t i = 0; i < across; i += kLanes) {
    int64_t place = i % width, lanes = place ? std::min<int64_t>(kLanes, width - place) : kLanes;
    float* panel = to + i / width * cells * width + place;  // what was written before it must stay
    decltype(Arithmetic::Along(matrix, 0)) lines[kLanes];
    for (int64_t r = 0; r < kLanes; ++r)
      lines[r] = Arithmetic::Along(matrix, part.row + std::min(i + r, across - 1));
    for (int64_t k = 0; k < depth; k += kPerVector, panel += kLanes * width) {
      int64_t column = part.column + k, count = std::min<int64_t>(kPerVector, depth - k);
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        rows[r] = count == kPerVector ? lines[r].Load(column) : lines[r].Load(column, count);
      Transpose(rows);
      if (count == kPerVector && lanes == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) Write(panel + r * width, rows[r]);
      } else {
        for (int64_t r = 0; r < CellsOf<Arithmetic>(count); ++r) Write(panel + r * width, rows[r], lanes);
      }
    }
  }
}

// A vector may reach past a panel's width, into what is written next; so the memory needs a vector's room at its end.
template <typename Arithmetic, typename Stored>
void Pack(Stored matrix, Part part, int64_t across, int64_t depth, int64_t width, float* to) {
  if (!part.rows_are_depth) return PackColumns<Arithmetic>(matrix, part, across, depth, width, to);
  if (across > width) return PackRows<Arithmetic, true>(matrix, part, across, depth, width, to);
  PackRows<Arithmetic, false>(matrix, part, across, depth, width, to);
}

}  // namespace
