// Numbers of 32 and 16 bits, as they lie in tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

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

// What is multiplied with weights, [num_rows, width].
struct X {
  const void* values;
  int64_t type, num_rows, width;
};

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

inline void put(void* out, int64_t type, int64_t index, float value) {
  if (type == FLOAT32) static_cast<float*>(out)[index] = value;
  else if (type == BFLOAT16) static_cast<uint16_t*>(out)[index] = to_bfloat16(value);
  else static_cast<uint16_t*>(out)[index] = to_float16(value);
}

// The reverse, from index `first` of `to` on.
void from_floats(const float* from, int64_t type, int64_t first, int64_t count, void* to) {
  if (type == FLOAT32) {
    std::memcpy(static_cast<float*>(to) + first, from, size_t(count) * 4);
    return;
  }
  uint16_t* values = static_cast<uint16_t*>(to) + first;
  int64_t i = 0;
  if (type == BFLOAT16) {
    for (; i < count; i++) values[i] = to_bfloat16(from[i]);
    return;
  }
#ifdef __F16C__
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < count; i++) values[i] = to_float16(from[i]);
}

// e^x for x <= 0, within 2e-7 of it; a loop of them becomes vectors.
inline float exp_of(float x) {
  const float t = std::max(x, -87.f);
  const int32_t n = int32_t(t * 1.44269504f - 0.5f);  // rounds, as t <= 0
  const float f = (t - float(n) * 0.693359375f) + float(n) * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  return p * from_bits(uint32_t(n + 127) << 23);
}

}  // namespace
