// A matrix that lies turned, copied row by row: element [i, o] of the target is element [o, i] of the source, whose
// rows, of one o, are contiguous. Squares of both stay in the first cache; the elements are whole numbers of 1, 2 or 4
// bytes, or bfloat16 that becomes float32.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kSide = 64;

template <typename From, typename To, int kShift>
void turn(const char* source, int64_t source_step, char* target, int64_t target_step, int64_t rows, int64_t columns) {
  To square[kSide][kSide];
  for (int64_t row = 0; row < rows; row += kSide) {
    const int64_t high = rows - row < kSide ? rows - row : kSide;
    for (int64_t column = 0; column < columns; column += kSide) {
      const int64_t wide = columns - column < kSide ? columns - column : kSide;
      for (int64_t c = 0; c < wide; ++c) {
        const From* from = reinterpret_cast<const From*>(source + (column + c) * source_step) + row;
        for (int64_t r = 0; r < high; ++r) square[r][c] = static_cast<To>(from[r]) << kShift;
      }
      for (int64_t r = 0; r < high; ++r) {
        std::memcpy(target + (row + r) * target_step + column * sizeof(To), square[r], wide * sizeof(To));
      }
    }
  }
}

}  // namespace

// kind: the size of an element in bytes, or 24 for 2 that become 4.
extern "C" int turned_copy(const char* source, int64_t source_step, char* target, int64_t target_step, int64_t rows,
                           int64_t columns, int kind) {
  switch (kind) {
    case 1: turn<uint8_t, uint8_t, 0>(source, source_step, target, target_step, rows, columns); return 0;
    case 2: turn<uint16_t, uint16_t, 0>(source, source_step, target, target_step, rows, columns); return 0;
    case 4: turn<uint32_t, uint32_t, 0>(source, source_step, target, target_step, rows, columns); return 0;
    case 24: turn<uint16_t, uint32_t, 16>(source, source_step, target, target_step, rows, columns); return 0;
  }
  return 1;
}
