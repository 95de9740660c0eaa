// A packed weight, its numbers and their unpacking; packed_product.py says what one is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace {

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// Of int64 alone, as packed_product.py fills it.
struct Weight {
  const uint8_t* packed;
  const void* scale;
  const void* minimum;  // or null
  void* out;
  int64_t num_rows, bits, group, scale_type, minimum_type;
};
static_assert(sizeof(Weight) == 9 * sizeof(int64_t), "a table of int64");

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Numbers as float32; `type` is loop-invariant, so that each loop is one of vectors.
void to_floats(const void* from, int64_t type, int64_t first, int64_t count, float* to) {
  if (type == FLOAT32) {
    std::memcpy(to, static_cast<const float*>(from) + first, size_t(count) * 4);
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(from) + first;
  int64_t i = 0;
  if (type == BFLOAT16) {
    for (; i < count; i++) to[i] = from_bfloat16(values[i]);
    return;
  }
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < count; i++) to[i] = from_float16(values[i]);
}

void put(void* out, int64_t type, int64_t index, float value) {
  if (type == FLOAT32) static_cast<float*>(out)[index] = value;
  else if (type == BFLOAT16) static_cast<uint16_t*>(out)[index] = to_bfloat16(value);
  else static_cast<uint16_t*>(out)[index] = to_float16(value);
}

// COUNT columns of one group; constant, so that each loop becomes vectors.
template <int BITS, int TYPE, int COUNT>
void unpack_columns(const uint8_t* packed, float zero_point, float scale, float minimum, void* out) {
  uint8_t fields[COUNT];
  float values[COUNT];
  if (BITS == 8) {
    std::memcpy(fields, packed, COUNT);
  } else {
    uint32_t eights[COUNT / 8];
    uint64_t spread[COUNT / 8];  // each 4 bits in a byte of its own
    std::memcpy(eights, packed, COUNT / 2);
    for (int i = 0; i < COUNT / 8; i++) {
      uint64_t bits = eights[i];
      bits = (bits | bits << 16) & 0x0000FFFF0000FFFF;
      bits = (bits | bits << 8) & 0x00FF00FF00FF00FF;
      spread[i] = (bits | bits << 4) & 0x0F0F0F0F0F0F0F0F;
    }
    std::memcpy(fields, spread, COUNT);
  }
  for (int i = 0; i < COUNT; i++) values[i] = (float(fields[i]) - zero_point) * scale + minimum;
  for (int i = 0; i < COUNT; i++) put(out, TYPE, i, values[i]);
}

template <int BITS, int TYPE>
void unpack_row(const Weight& weight, int64_t width, int64_t row, void* out) {
  constexpr int64_t AT_ONCE = 64;  // groups
  const float zero_point = weight.minimum ? 0 : float(1 << (BITS - 1));
  const int64_t groups = width / weight.group;
  const uint8_t* packed = weight.packed + row * (width * BITS / 8);
  const auto unpack = [&](auto count, int64_t column, float scale, float minimum) {
    unpack_columns<BITS, TYPE, decltype(count)::value>(
        packed + column * BITS / 8, zero_point, scale, minimum,
        static_cast<char*>(out) + column * (TYPE == FLOAT32 ? 4 : 2));
  };
  for (int64_t first = 0; first < groups; first += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, groups - first), place = row * groups + first;
    float scales[AT_ONCE], minima[AT_ONCE] = {};
    to_floats(weight.scale, weight.scale_type, place, count, scales);
    if (weight.minimum) to_floats(weight.minimum, weight.minimum_type, place, count, minima);
    for (int64_t i = 0; i < count; i++) {
      int64_t column = (first + i) * weight.group;
      const int64_t end = column + weight.group;
      for (; column + 32 <= end; column += 32)
        unpack(std::integral_constant<int, 32>(), column, scales[i], minima[i]);
      if (column + 16 <= end) {
        unpack(std::integral_constant<int, 16>(), column, scales[i], minima[i]);
        column += 16;
      }
      for (; column < end; column += 8)
        unpack(std::integral_constant<int, 8>(), column, scales[i], minima[i]);
    }
  }
}

template <int BITS>
void unpack_row(const Weight& weight, int64_t width, int64_t row, int64_t type, void* out) {
  if (type == FLOAT32) unpack_row<BITS, FLOAT32>(weight, width, row, out);
  else if (type == BFLOAT16) unpack_row<BITS, BFLOAT16>(weight, width, row, out);
  else unpack_row<BITS, FLOAT16>(weight, width, row, out);
}

}  // namespace
