// A block of a packed weight's bytes as a vector, how its fields become factors of products, and what
// they are multiplied with.
#pragma once

#include "vectors.h"

namespace {

template <int BITS>
struct FloatForm {
  static constexpr bool READS_SCALES = false;  // as they lie; else float32 of them
  static constexpr int COLUMNS = 32 / BITS;    // of a lane
  static constexpr int VECTORS = COLUMNS;      // of a block's x
  static constexpr int START = 0;              // of these, what `multiply` is given besides
  struct Factors {
    Floats fields[COLUMNS];
  };

  // The last field is shifted: masked in place it could be negative.
  static constexpr bool is_shifted(int field) { return field == COLUMNS - 1; }

  // Whether the zero point is taken from the products, else from their sums.
  static bool has_zero_point() { return false; }
  static Words table(bool) { return Words(); }

  static Factors factors(Words words, Words) {
    Factors result;
#pragma GCC unroll 8
    for (int field = 0; field < COLUMNS; field++)
      result.fields[field] = is_shifted(field)
                                 ? shifted(words, 32 - BITS)
                                 : masked(words, ((1u << BITS) - 1) << (BITS * field));
    return result;
  }
  // Of every lane's fields.
  static Floats multiply(const Factors& factors, const float* x, const float*) {
    Floats even = zeros(), odd = zeros();
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i += 2) {
      even = multiply_add(factors.fields[i], load(x + i * LANES), even);
      odd = multiply_add(factors.fields[i + 1], load(x + (i + 1) * LANES), odd);
    }
    return add(even, odd);
  }
  // A block's columns as `multiply` takes them, and the sum of every lane's.
  static void arrange(const float* columns, float* x, float* sums) {
    for (int lane = 0; lane < LANES; lane++) sums[lane] = 0;
    for (int field = 0; field < COLUMNS; field++) {
      const float power = is_shifted(field) ? 1.f : 1.f / float(1u << (BITS * field));
      for (int lane = 0; lane < LANES; lane++) {
        const float column = columns[lane * COLUMNS + field];
        x[field * LANES + lane] = column * power;
        sums[lane] += column;
      }
    }
  }
};

#ifdef LLAMAC_BRAINS
// What the bits of a table's numbers are, twice the sixteen less a zero point.
struct BrainTable {
  alignas(64) uint16_t numbers[32];

  constexpr explicit BrainTable(int zero_point) : numbers() {
    for (int i = 0; i < 32; i++) {
      const int number = i % 16 - zero_point, size = number < 0 ? -number : number;
      int exponent = 0;
      while (size >> (exponent + 1)) exponent++;
      const int bits = (exponent + 127) << 7 | ((size << 7 >> exponent) & 127);
      numbers[i] = uint16_t(size ? bits | (number < 0 ? 0x8000 : 0) : 0);
    }
  }
};

// For an x of bfloat16 and 4 bits: a table makes both of bfloat16, which is exact.
struct BrainForm {
  static constexpr bool READS_SCALES = true;
  static constexpr int COLUMNS = 8, VECTORS = 4, START = 0;
  struct Factors {
    __m512bh fields[VECTORS];
  };

  static bool has_zero_point() { return true; }
  static Words table(bool has_zero_point) {
    static constexpr BrainTable UNSIGNED(0), SIGNED(8);
    return load_words((has_zero_point ? SIGNED : UNSIGNED).numbers);
  }

  static Factors factors(Words words, Words table) {
    Factors result;
    // Of an index's bits the fifth, a neighbour's, changes nothing.
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
      const Words index = i ? _mm512_srli_epi16(words, unsigned(4 * i)) : words;
      result.fields[i] = (__m512bh)_mm512_permutexvar_epi16(index, table);
    }
    return result;
  }
  static Floats multiply(const Factors& factors, const float* x, const float*) {
    Floats even = zeros(), odd = zeros();
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; i += 2) {
      even = _mm512_dpbf16_ps(even, factors.fields[i], (__m512bh)load(x + i * LANES));
      odd = _mm512_dpbf16_ps(odd, factors.fields[i + 1], (__m512bh)load(x + (i + 1) * LANES));
    }
    return add(even, odd);
  }
  static void arrange(const float* columns, float* x, float* sums) {
    Words brains[VECTORS];  // of 32 columns each
    for (int i = 0; i < VECTORS; i++) {
      const auto half = [&](int h) {
        const Words bits = load_words(columns + (2 * i + h) * LANES);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
      };
      brains[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
    }
    // Every fourth column from the field's on, 16 of them from two vectors.
    alignas(64) uint16_t every[32];
    for (int i = 0; i < 32; i++) every[i] = uint16_t(i % 16 * 4);
    const Words ones = _mm512_set1_epi16(0x3F80);
    Floats totals = zeros();
    for (int field = 0; field < VECTORS; field++) {
      const Words index = _mm512_add_epi16(load_words(every), _mm512_set1_epi16(short(field)));
      const Words low = _mm512_permutex2var_epi16(brains[0], index, brains[1]);
      const Words high = _mm512_permutex2var_epi16(brains[2], index, brains[3]);
      const Words own = _mm512_mask_blend_epi32(0xFF00, low, high);
      _mm512_storeu_si512(x + field * LANES, own);
      totals = _mm512_dpbf16_ps(totals, (__m512bh)own, (__m512bh)ones);
    }
    store(sums, totals);
  }
};
#endif

#ifdef LLAMAC_BYTES
// For an x of bfloat16 and 8 bits: the numbers of a lane become integers of 15 bits and a scale, each
// within 2^-15 of the largest, which bfloat16's own rounding is far above. Their upper and lower
// halves are bytes, which are multiplied as bytes.
struct ByteForm {
  static constexpr bool READS_SCALES = true;
  static constexpr int COLUMNS = 4;
  // Upper and lower bytes, the scales, and what the zero point takes away.
  static constexpr int SCALE = 2, START = 3, VECTORS = 4;
  static constexpr float LARGEST = 127 * 128 + 63;
  using Factors = Words;

  static bool has_zero_point() { return true; }
  static Words table(bool) { return Words(); }

  static Factors factors(Words words, Words) { return words; }
  static Floats multiply(Factors factors, const float* x, const float* start) {
    const Words upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), factors, load_words(x));
    const Words lower = _mm512_dpbusd_epi32(load_words(start), factors, load_words(x + LANES));
    const Words total = _mm512_add_epi32(_mm512_slli_epi32(upper, 7), lower);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(total), load(x + SCALE * LANES));
  }
  // Of each field all lanes': a transposition.
  static void split(const float* columns, Floats* fields) {
    alignas(64) uint32_t index[LANES];  // four lanes of each of four fields
    for (int i = 0; i < LANES; i++) index[i] = uint32_t(i % 4 * COLUMNS + i / 4);
    Floats four[4];
    for (int i = 0; i < 4; i++)
      four[i] = _mm512_permutexvar_ps(load_words(index), load(columns + i * LANES));
    const Floats low = _mm512_shuffle_f32x4(four[0], four[1], 0x44),
                 high = _mm512_shuffle_f32x4(four[0], four[1], 0xEE),
                 next_low = _mm512_shuffle_f32x4(four[2], four[3], 0x44),
                 next_high = _mm512_shuffle_f32x4(four[2], four[3], 0xEE);
    fields[0] = _mm512_shuffle_f32x4(low, next_low, 0x88);
    fields[1] = _mm512_shuffle_f32x4(low, next_low, 0xDD);
    fields[2] = _mm512_shuffle_f32x4(high, next_high, 0x88);
    fields[3] = _mm512_shuffle_f32x4(high, next_high, 0xDD);
  }
  static void arrange(const float* columns, float* x, float* sums) {
    Floats fields[COLUMNS], most = zeros(), no_number = zeros();
    split(columns, fields);
    for (const Floats field : fields) {
      most = _mm512_max_ps(_mm512_abs_ps(field), most);
      no_number = multiply_add(field, zeros(), no_number);
    }
    const Floats scale = multiply_add(most, spread(1 / LARGEST), no_number);
    const __mmask16 has_any = _mm512_cmp_ps_mask(scale, zeros(), _CMP_NEQ_UQ);
    const Floats inverse = _mm512_maskz_div_ps(has_any, spread(1), scale);
    Words upper = _mm512_setzero_si512(), lower = upper, total = upper;
#pragma GCC unroll 4
    for (int field = 0; field < COLUMNS; field++) {
      const Words number = _mm512_cvtps_epi32(_mm512_mul_ps(fields[field], inverse));
      const Words high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(64)), 7);
      const Words low = _mm512_sub_epi32(number, _mm512_slli_epi32(high, 7));
      const __mmask64 own = 0x1111111111111111u << field;
      const unsigned shift = unsigned(8 * field);
      upper = _mm512_mask_blend_epi8(own, upper, _mm512_slli_epi32(high, shift));
      lower = _mm512_mask_blend_epi8(own, lower, _mm512_slli_epi32(low, shift));
      total = _mm512_add_epi32(total, number);
    }
    _mm512_storeu_si512(x, upper);
    _mm512_storeu_si512(x + LANES, lower);
    store(x + SCALE * LANES, scale);
    const Words zero_point = _mm512_slli_epi32(total, 7);
    _mm512_storeu_si512(x + START * LANES, _mm512_sub_epi32(_mm512_setzero_si512(), zero_point));
    store(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
  }
};
#endif

}  // namespace
