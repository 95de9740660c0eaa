// A block of a packed weight's bytes as a vector, and how its fields become factors of products.
#pragma once

#include "vectors.h"

namespace {

template <int BITS>
struct FloatForm {
  static constexpr int COLUMNS = 32 / BITS;  // of a lane
  static constexpr int VECTORS = COLUMNS;    // of a block's x
  using Factor = Floats;

  // The last field is shifted: masked in place it could be negative.
  static constexpr bool is_shifted(int field) { return field == COLUMNS - 1; }

  static Factor factor(Words words, int field) {
    if (is_shifted(field)) return shifted(words, 32 - BITS);
    return masked(words, ((1u << BITS) - 1) << (BITS * field));
  }
  static Floats multiply(Factor factor, Floats x, Floats sums) {
    return multiply_add(factor, x, sums);
  }
  static void arrange(const float* columns, float* x) {
    for (int field = 0; field < COLUMNS; field++) {
      const float power = is_shifted(field) ? 1.f : 1.f / float(1u << (BITS * field));
      for (int lane = 0; lane < LANES; lane++)
        x[field * LANES + lane] = columns[lane * COLUMNS + field] * power;
    }
  }
};

#ifdef LLAMAC_BRAINS
// For an x of bfloat16 and 4 bits: a table makes both of bfloat16, which is exact.
struct BrainForm {
  static constexpr int COLUMNS = 8;
  static constexpr int VECTORS = 4;
  using Factor = __m512bh;

  static Factor factor(Words words, int field) {
    // The numbers 0 to 15, twice: of an index's bits the fifth, a neighbour's, changes nothing.
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0,      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
        0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const Words index = field ? _mm512_srli_epi16(words, unsigned(4 * field)) : words;
    return (__m512bh)_mm512_permutexvar_epi16(index, _mm512_load_si512(TABLE));
  }
  static Floats multiply(Factor factor, Floats x, Floats sums) {
    return _mm512_dpbf16_ps(sums, factor, (__m512bh)x);
  }
  static void arrange(const float* columns, float* x) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(x);
    for (int lane = 0; lane < 2 * LANES; lane++)
#pragma GCC unroll 4
      for (int field = 0; field < 4; field++)
        halves[field * 2 * LANES + lane] = uint16_t(to_bits(columns[lane * 4 + field]) >> 16);
  }
};
#endif

}  // namespace
