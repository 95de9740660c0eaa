// Numbers of 16 bits; a block's bytes as a vector of 32-bit lanes (16 with AVX-512, else 8), and how
// its fields become the factors of products.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LLAMAC_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define LLAMAC_AVX2
#endif
#if defined(LLAMAC_AVX512) || defined(LLAMAC_AVX2) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float from_bfloat16(uint16_t value) { return from_bits(uint32_t(value) << 16); }

uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value), odd = bits >> 16 & 1;
  const uint16_t nan = bits >> 16 | 64;
  return value == value ? uint16_t((bits + 0x7FFF + odd) >> 16) : nan;
}

float from_float16(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000) << 16, rest = uint32_t(value & 0x7FFF) << 13;
  if (rest >= 0x0F800000) return from_bits(sign | rest | 0x7F800000);  // infinite, or no number
  return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));
}

uint16_t to_float16(float value) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000, rest = to_bits(value) & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;
  // Below 2^-14 the spacing is 2^-24: adding a half rounds to it.
  if (rest < 0x38800000) return sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f));
  return sign | ((rest - 0x38000000 + 0x0FFF + (rest >> 13 & 1)) >> 13);
}

#if defined(LLAMAC_AVX512)

constexpr int64_t LANES = 16;
using Floats = __m512;
using Words = __m512i;

inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats take(const float* from, Words lanes) {
  return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x8(_mm256_loadu_ps(from)));
}
inline Floats masked(Words words, uint32_t mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, unsigned(shift)));
}
inline float sum(Floats value) { return _mm512_reduce_add_ps(value); }

#elif defined(LLAMAC_AVX2)

constexpr int64_t LANES = 8;
using Floats = __m256;
using Words = __m256i;

inline Words load_words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats take(const float* from, Words lanes) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), lanes);
}
inline Floats masked(Words words, uint32_t mask) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, shift));
}
inline float sum(Floats value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#else

constexpr int64_t LANES = 8;
struct Floats { float lane[LANES]; };
struct Words { uint32_t lane[LANES]; };

template <class Result, class Function>
inline Result each(Function function) {
  Result result;
  for (int i = 0; i < LANES; i++) result.lane[i] = function(i);
  return result;
}
inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}
inline Floats load(const float* from) {
  return each<Floats>([&](int i) { return from[i]; });
}
inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats zeros() { return Floats{}; }
inline Floats add(Floats a, Floats b) {
  return each<Floats>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Floats take(const float* from, Words lanes) {
  return each<Floats>([&](int i) { return from[lanes.lane[i]]; });
}
inline Floats masked(Words words, uint32_t mask) {
  return each<Floats>([&](int i) { return float(int32_t(words.lane[i] & mask)); });
}
inline Floats shifted(Words words, int shift) {
  return each<Floats>([&](int i) { return float(int32_t(words.lane[i] >> shift)); });
}
inline float sum(Floats value) {
  float total = 0;
  for (float lane : value.lane) total += lane;
  return total;
}

#endif

constexpr int64_t BLOCK_BYTES = 4 * LANES;

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

#if defined(LLAMAC_AVX512) && defined(__AVX512BF16__)
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
