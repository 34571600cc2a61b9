// Grouped products of rows with packed matrices (kernels/quantized); compiled by kernels/native_code.py.
//
// Codes become float32 while a panel is packed, or in the registers of a few rows; the matrices never stand unpacked.
// The macro FORMAT names one format: a process compiles those that it uses.

#include "native.h"

namespace {

INLINE Vector Numbers(Integers codes) { return __builtin_convertvector(codes, Vector); }
INLINE Vector Select(Integers mask, Vector yes, Vector no) {
  return Bits<Vector>((mask & Bits<Integers>(yes)) | (~mask & Bits<Integers>(no)));
}

// --- Formats, as kernels/quantized/formats.py describes them: the numbers of the codes in a slot of each byte.

template <int kBits>
struct Integer {
  static constexpr int kPerByte = 8 / kBits;
  static constexpr int kScaleBytes = 4;
  static INLINE Vector Decode(Bytes bytes, int slot) {
    if constexpr (kBits == 8) return Numbers(Signed(bytes));
    if (slot == kPerByte - 1) return Numbers(Signed(bytes) >> (8 - kBits));
    // Up to the highest bits and back down: the shift down repeats the sign.
    return Numbers(Signed(bytes) << (32 - kBits * (slot + 1)) >> (32 - kBits));
  }
};

struct Float8 {  // e4m3
  static constexpr int kPerByte = 1;
  static constexpr int kScaleBytes = 4;
  static INLINE Vector Decode(Bytes bytes, int) {
    Integers wide = Wide(bytes), size = wide & 0x7f;
    // The exponent's bias is 7, float32's 127. Below the smallest exponent the step is 2^-9.
    Vector normal = Bits<Vector>((size << 20) + (120 << 23));
    Vector number = Select(size < 8, Numbers(size) * 0x1p-9f, normal);
    number = Select(size == 0x7f, Bits<Vector>(Integers{} + 0x7fc00000), number);
    return Bits<Vector>(Bits<Integers>(number) | (wide & 0x80) << 24);
  }
};

template <int... L>
INLINE Vector Lookup(const float* table, Integers codes, std::integer_sequence<int, L...>) {
#if defined(__AVX512F__) && !defined(__clang__)
  return __builtin_shuffle(Read<Vector>(table), codes);
#else
  return Vector{table[codes[L]]...};
#endif
}

template <const float (&kTable)[16], int kBytesOfScale>
struct Table {
  static constexpr int kPerByte = 2;
  static constexpr int kScaleBytes = kBytesOfScale;
  static INLINE Vector Decode(Bytes bytes, int slot) {
    return Lookup(kTable, (Wide(bytes) >> 4 * slot) & 15, std::make_integer_sequence<int, kLanes>{});
  }
};

constexpr float kNormalFloat[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float kFloat4[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

using int8 = Integer<8>;
using int4 = Integer<4>;
using int2 = Integer<2>;
using fp8_e4m3 = Float8;
using nf4 = Table<kNormalFloat, 4>;
using mxfp4 = Table<kFloat4, 1>;

// A matrix of codes, with a scale and perhaps a zero point for each column and each `group` of rows.
template <typename Format>
struct Packed {
  static constexpr bool kHasScales = true;
  const uint8_t* codes;
  const uint8_t* scales;  // float32, or E8M0 where they are powers of two
  const int8_t* zero_points;
  int64_t columns, group;

  struct Line {
    static constexpr int kPerByte = Format::kPerByte;
    const uint8_t *codes, *scales;
    const int8_t* zero_points;
    int own_slot;
    INLINE Vector Load(int64_t column, int64_t count = kLanes) const {
      return (Code(column, own_slot, count) - ZeroPoint(column, count)) * Scale(column, count);
    }
    // Also of the neighbours that share the row's bytes, for who knows the slot.
    INLINE Vector Code(int64_t column, int slot, int64_t count = kLanes) const {
      return Format::Decode(Read<Bytes>(codes + column, count), slot);
    }
    INLINE Vector ZeroPoint(int64_t column, int64_t count = kLanes) const {
      return zero_points ? Numbers(Signed(Read<Bytes>(zero_points + column, count))) : Vector{};
    }
    INLINE Vector Scale(int64_t column, int64_t count = kLanes) const {
      if constexpr (Format::kScaleBytes == 4)
        return Read<Vector>(reinterpret_cast<const float*>(scales) + column, count);
      Integers exponents = Wide(Read<Bytes>(scales + column, count));
      Vector power = Select(exponents == 0, Bits<Vector>(Integers{} + (1 << 22)), Bits<Vector>(exponents << 23));
      return Select(exponents == 255, Bits<Vector>(Integers{} + 0x7fc00000), power);
    }
    static bool OneScale(const Line& first, const Line& last) { return first.scales == last.scales; }
  };
  INLINE Line Row(int64_t row) const {
    int64_t scale = row / group * columns;
    return {codes + row / Format::kPerByte * columns, scales + scale * Format::kScaleBytes,
            zero_points ? zero_points + scale : nullptr, static_cast<int>(row % Format::kPerByte)};
  }
};

ffi::Error RowsTimesPacked(ffi::ThreadPool pool, bool transposed, int64_t group_size, ffi::AnyBuffer x,
                           ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer zero_points, ffi::AnyBuffer sizes,
                           ffi::Result<ffi::AnyBuffer> result) {
  int64_t columns = codes.dimensions()[2];
  auto codes_data = static_cast<const uint8_t*>(codes.untyped_data());
  auto scales_data = static_cast<const uint8_t*>(scales.untyped_data());
  auto zero_points_data = static_cast<const int8_t*>(zero_points.untyped_data());
  int64_t size = codes.dimensions()[1] * columns, scale_size = scales.dimensions()[1] * columns;
  bool with_zero_points = zero_points.element_count() > 0;
  auto matrix = [&](int64_t e) {
    return Packed<FORMAT>{codes_data + e * size, scales_data + e * scale_size * FORMAT::kScaleBytes,
                          with_zero_points ? zero_points_data + e * scale_size : nullptr, columns, group_size};
  };
  RowsTimesMatrices(pool, LeftOf(x, false), sizes, transposed, matrix, result);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rows_times_packed, RowsTimesPacked,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("group_size")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
