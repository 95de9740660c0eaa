// A packed weight's numbers; packed_product.py says what a packed weight is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "vectors.h"

namespace {

template <int TYPE>
inline void store_as(void* to, int64_t index, Floats value) {
  if (TYPE == FLOAT32) store(static_cast<float*>(to) + index, value);
  else if (TYPE == BFLOAT16) store_brains(static_cast<uint16_t*>(to) + index, value);
  else store_halves(static_cast<uint16_t*>(to) + index, value);
}

#ifdef LLAMAC_AVX512
// A group's numbers of 4 bits as bfloat16, 32 at a time: all sixteen that it can have are looked up.
inline void look_up(const uint8_t* packed, int64_t count, float scale, float offset, void* out) {
  const Floats fields = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Words table =
      _mm512_broadcast_i64x4(to_brains(multiply_add(fields, spread(scale), spread(offset))));
  for (int64_t i = 0; i < count; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const Words words = _mm512_cvtepu8_epi32(bytes);
    // Of each 16 bits the lowest four are a field; the fifth chooses between two equal tables.
    const Words places = _mm512_or_si512(words, _mm512_slli_epi32(words, 12));
    _mm512_storeu_si512(static_cast<uint16_t*>(out) + i, _mm512_permutexvar_epi16(places, table));
  }
}
#endif

// The columns `first` to `last` of a row; the former is the first of a group, or the row has but one.
template <int BITS, int TYPE>
void unpack_columns(const PackedWeight& weight, int64_t width, int64_t row, int64_t first,
                    int64_t last, void* out) {
  constexpr int64_t AT_ONCE = 64;  // groups
  const int64_t groups = width / weight.group, end_group = divide_up(last, weight.group);
  const uint8_t* packed = weight.packed + row * (width * BITS / 8);
  out = static_cast<char*>(out) - first * (TYPE == FLOAT32 ? 4 : 2);
  for (int64_t group = first / weight.group; group < end_group; group += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, end_group - group), place = row * groups + group;
    float scales[AT_ONCE], offsets[AT_ONCE];
    to_floats(weight.scale, weight.scale_type, place, count, scales);
    if (weight.minimum) to_floats(weight.minimum, weight.minimum_type, place, count, offsets);
    else  // exact: the zero point is a power of two
      for (int64_t i = 0; i < count; i++) offsets[i] = -float(1 << (BITS - 1)) * scales[i];
#ifdef LLAMAC_AVX512
    if (BITS == 4 && TYPE == BFLOAT16 && weight.group % 32 == 0 && weight.group <= last - first) {
      for (int64_t i = 0, column = group * weight.group; i < count; i++, column += weight.group)
        look_up(packed + column / 2, weight.group, scales[i], offsets[i],
                static_cast<uint16_t*>(out) + column);
      continue;
    }
#endif
    for (int64_t i = 0; i < count; i++) {
      const float scale = scales[i], offset = offsets[i];
      int64_t column = std::max((group + i) * weight.group, first);
      const int64_t end = std::min((group + i + 1) * weight.group, last);
      const auto unpack = [&](int64_t at) __attribute__((always_inline)) {
        const uint8_t* from = packed + uint64_t(at) * BITS / 8;
        const Floats fields = BITS == 4 ? load_fields4(from) : load_fields8(from);
        store_as<TYPE>(out, at, multiply_add(fields, spread(scale), spread(offset)));
      };
      for (; column + 32 <= end; column += 32)
#pragma GCC unroll 4
        for (int64_t at = 0; at < 32; at += LANES) unpack(column + at);
      for (; column + LANES <= end; column += LANES) unpack(column);
      for (; column < end; column++) {
        const uint8_t byte = packed[uint64_t(column) * BITS / 8];
        const int field = BITS == 8 ? byte : byte >> (column % 2 * 4) & 15;
        put(out, TYPE, column, float(field) * scale + offset);
      }
    }
  }
}

template <int BITS>
void unpack_columns(const PackedWeight& weight, int64_t width, int64_t row, int64_t first,
                    int64_t last, int64_t type, void* out) {
  if (type == FLOAT32) unpack_columns<BITS, FLOAT32>(weight, width, row, first, last, out);
  else if (type == BFLOAT16) unpack_columns<BITS, BFLOAT16>(weight, width, row, first, last, out);
  else unpack_columns<BITS, FLOAT16>(weight, width, row, first, last, out);
}

}  // namespace
