// A packed weight, its numbers and their unpacking; packed_product.py says what one is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"
#include "products.h"

namespace {

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
void unpack_row(const PackedWeight& weight, int64_t width, int64_t row, void* out) {
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
void unpack_row(const PackedWeight& weight, int64_t width, int64_t row, int64_t type, void* out) {
  if (type == FLOAT32) unpack_row<BITS, FLOAT32>(weight, width, row, out);
  else if (type == BFLOAT16) unpack_row<BITS, BFLOAT16>(weight, width, row, out);
  else unpack_row<BITS, FLOAT16>(weight, width, row, out);
}

}  // namespace
