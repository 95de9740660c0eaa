// Vectors of 32-bit lanes: 16 with AVX-512, else 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LLAMAC_AVX512
#ifdef __AVX512VNNI__
#define LLAMAC_BYTES  // products of bytes
#ifdef __AVX512BF16__
#define LLAMAC_BRAINS  // products of bfloat16, which no processor has without those
#endif
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define LLAMAC_AVX2
#endif
#if defined(LLAMAC_AVX512) || defined(LLAMAC_AVX2)
#include <immintrin.h>
#endif

namespace {

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
// The same of numbers of 16 bits, whose bytes `bytes` names: of bfloat16 in the upper half of every
// lane, with 0x80 in the lower one; of float16 in every half.
inline Floats take_brains(const uint16_t* from, Words bytes) {
  const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), bytes));
}
inline Floats take_halves(const uint16_t* from, Words bytes) {
  const __m256i numbers = _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_cvtph_ps(_mm256_shuffle_epi8(numbers, _mm512_castsi512_si256(bytes)));
}
inline Floats first_lanes(Floats value, int64_t count) {
  return _mm512_maskz_mov_ps(__mmask16((1u << count) - 1), value);
}
inline Floats masked(Words words, uint32_t mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, unsigned(shift)));
}
inline float sum(Floats value) { return _mm512_reduce_add_ps(value); }
inline void sum_four(const Floats* values, float* sums) {
  const auto halves = [](Floats a, Floats b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const Floats two = halves(values[0], values[1]), others = halves(values[2], values[3]);
  Floats four = add(_mm512_shuffle_f32x4(two, others, 0x88), _mm512_shuffle_f32x4(two, others, 0xDD));
  four = add(four, _mm512_permute_ps(four, 0x4E));
  four = add(four, _mm512_permute_ps(four, 0xB1));
  const Words firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, four)));
}
inline Floats spread(float value) { return _mm512_set1_ps(value); }
inline Floats low_brains(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline Floats high_brains(Words words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xFFFF0000))));
}
inline Floats load_brains(const uint16_t* from) {
  const __m256i brains = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(brains), 16));
}
inline Floats load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// A vector's numbers of 4 bits, the low ones first, or of 8.
inline Floats load_fields4(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const Words halves = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
      _mm512_castsi128_si512(bytes));
  const Words shifts =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  return masked(_mm512_srlv_epi32(halves, shifts), 15);
}
inline Floats load_fields8(const uint8_t* from) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void store_halves(uint16_t* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, 0));
}
inline __m256i to_brains(Floats value) {
#ifdef LLAMAC_BRAINS
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const Words bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const Words half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, half), 16));
#endif
}
inline void store_brains(uint16_t* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_brains(value));
}

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
inline Floats spread(float value) { return _mm256_set1_ps(value); }
inline Floats low_brains(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
inline Floats high_brains(Words words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000))));
}
inline Floats load_brains(const uint16_t* from) {
  const __m128i brains = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(brains), 16));
}
inline Floats load_halves(const uint16_t* from) {
#ifdef __F16C__
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  float values[LANES];
  for (int i = 0; i < LANES; i++) values[i] = from_float16(from[i]);
  return load(values);
#endif
}
inline Floats load_fields4(const uint8_t* from) {
  int32_t bits;
  std::memcpy(&bits, from, 4);
  const Words shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return masked(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shifts), 15);
}
inline Floats load_fields8(const uint8_t* from) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline void store_halves(uint16_t* to, Floats value) {
#ifdef __F16C__
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, 0));
#else
  float values[LANES];
  store(values, value);
  for (int i = 0; i < LANES; i++) to[i] = to_float16(values[i]);
#endif
}
inline void store_brains(uint16_t* to, Floats value) {
  const Words bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
  const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const Words half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const Words rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m128i low = _mm256_castsi256_si128(rounded);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi32(low, _mm256_extracti128_si256(rounded, 1)));
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
inline Floats spread(float value) {
  return each<Floats>([&](int) { return value; });
}
inline Floats low_brains(Words words) {
  return each<Floats>([&](int i) { return from_bits(words.lane[i] << 16); });
}
inline Floats high_brains(Words words) {
  return each<Floats>([&](int i) { return from_bits(words.lane[i] & 0xFFFF0000); });
}
inline Floats load_brains(const uint16_t* from) {
  return each<Floats>([&](int i) { return from_bfloat16(from[i]); });
}
inline Floats load_halves(const uint16_t* from) {
  return each<Floats>([&](int i) { return from_float16(from[i]); });
}
inline Floats load_fields4(const uint8_t* from) {
  return each<Floats>([&](int i) { return float(from[i / 2] >> (i % 2 * 4) & 15); });
}
inline Floats load_fields8(const uint8_t* from) {
  return each<Floats>([&](int i) { return float(from[i]); });
}
inline void store_halves(uint16_t* to, Floats value) {
  for (int i = 0; i < LANES; i++) to[i] = to_float16(value.lane[i]);
}
inline void store_brains(uint16_t* to, Floats value) {
  for (int i = 0; i < LANES; i++) to[i] = to_bfloat16(value.lane[i]);
}

#endif

// LANES x LANES words, those of row i and column j to row j and column i; rows are strides apart.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#ifdef LLAMAC_AVX512
  Floats rows[LANES], parts[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = load(from + i * from_stride);
  for (int i = 0; i < LANES; i += 2) {
    parts[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    parts[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d a = _mm512_castps_pd(parts[i + j]), b = _mm512_castps_pd(parts[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // Now a quarter q of vector i + j has column 4 q + j of rows i to i + 3.
  for (int j = 0; j < 4; j++) {
    const Floats even = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0x88);
    const Floats odd = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0xDD);
    const Floats last_even = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0x88);
    const Floats last_odd = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0xDD);
    store(to + j * to_stride, _mm512_shuffle_f32x4(even, last_even, 0x88));
    store(to + (j + 4) * to_stride, _mm512_shuffle_f32x4(odd, last_odd, 0x88));
    store(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(even, last_even, 0xDD));
    store(to + (j + 12) * to_stride, _mm512_shuffle_f32x4(odd, last_odd, 0xDD));
  }
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

constexpr int64_t BLOCK_BYTES = 4 * LANES;  // of a vector

// The numbers of a type from index `first` on, of which `count` are there; zeros behind them.
inline Floats load_as(const void* from, int64_t type, int64_t first, int64_t count) {
  const uint16_t* halves = static_cast<const uint16_t*>(from) + first;
#ifdef LLAMAC_AVX512
  const auto lanes = __mmask16(count >= LANES ? 0xFFFF : (1 << count) - 1);
  if (type == FLOAT32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from) + first);
  const __m256i numbers = _mm256_maskz_loadu_epi16(lanes, halves);
  if (type == FLOAT16) return _mm512_cvtph_ps(numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
#else
  if (count >= LANES && type == FLOAT32) return load(static_cast<const float*>(from) + first);
  if (count >= LANES && type == FLOAT16) return load_halves(halves);
  if (count >= LANES) return load_brains(halves);
  float values[LANES] = {};
  to_floats(from, type, first, count, values);
  return load(values);
#endif
}

// The sum of each vector's lanes.
template <int COUNT>
inline void sum_each(const Floats* values, float* sums) {
#ifdef LLAMAC_AVX512
  if constexpr (COUNT == 4) return sum_four(values, sums);
#endif
  for (int i = 0; i < COUNT; i++) sums[i] = sum(values[i]);
}

}  // namespace
