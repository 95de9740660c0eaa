// Vectors of 32-bit lanes: 16 with AVX-512, else 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LLAMAC_AVX512
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
inline Floats masked(Words words, uint32_t mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, unsigned(shift)));
}
inline float sum(Floats value) { return _mm512_reduce_add_ps(value); }
inline Floats spread(float value) { return _mm512_set1_ps(value); }
inline Floats low_brains(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline Floats high_brains(Words words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xFFFF0000))));
}
inline Floats load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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
inline Floats load_halves(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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
inline Floats load_halves(const uint16_t* from) {
  return each<Floats>([&](int i) { return from_float16(from[i]); });
}

#endif

constexpr int64_t BLOCK_BYTES = 4 * LANES;  // of a vector

}  // namespace
