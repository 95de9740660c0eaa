// The product of many rows of one matrix with a few of another.
//
// The former is turned around, so that a vector's lanes are its rows. What is multiplied with them
// is one word of a row of the latter, spread over a vector: a float, or two numbers of bfloat16. So
// the latter is read as it lies.
#pragma once

// GCC's choice of induction variables spills the pointers of the loop over words.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-ivopts")
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int MAX_VECTORS = LANES == 16 ? 4 : 2;  // of rows of x at once
constexpr int SUMS = LANES == 16 ? 24 : 12;       // that there are registers for
constexpr int64_t LINE_BYTES = 64;                // of the cache

// Rows of the latter at once.
template <int VECTORS>
constexpr int TILE_ROWS = std::min(SUMS / VECTORS, 16);

// How words are multiplied.
struct FloatForm {
  static constexpr int64_t TYPE = FLOAT32, COLUMNS = 1;
  static Floats multiply(Floats x, Floats word, Floats sums) { return multiply_add(x, word, sums); }
};

#ifdef LLAMAC_BRAINS
struct BrainForm {
  static constexpr int64_t TYPE = BFLOAT16, COLUMNS = 2;
  static Floats multiply(Floats x, Floats word, Floats sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)word);
  }
};
#endif

// Numbers as a form's type, which is that of the numbers or float32.
template <int64_t TYPE>
void to_type(const void* from, int64_t type, int64_t first, int64_t count, void* to) {
  if constexpr (TYPE == FLOAT32) to_floats(from, type, first, count, static_cast<float*>(to));
  else std::memcpy(to, static_cast<const uint16_t*>(from) + first, size_t(count) * 2);
}

// LANES lines of as many words turned around; of the steps that makes, those that there are.
inline void turn(const float* lines, int64_t steps, float* to, int64_t stride) {
  float turned[LANES][LANES];
  transpose(lines, LANES, turned[0], LANES);
  for (int64_t i = 0; i < std::min(LANES, steps); i++)
    std::memcpy(to + i * stride, turned[i], sizeof turned[i]);
}

// What is fetched while a tile is multiplied: of each row that follows a line after so many steps.
struct Ahead {
  const uint8_t* bytes;
  int64_t row_bytes, steps;

  static Ahead none(int64_t steps) { return {nullptr, 0, steps}; }
};

// sums [TILE_ROWS, stride] += the products of a panel's steps with as many words of each row.
template <class Form, int VECTORS>
void multiply_tile(const float* x, int64_t steps, const float* const* rows, float* sums,
                   int64_t stride, bool is_first, Ahead ahead) {
  constexpr int ROWS = TILE_ROWS<VECTORS>;
  Floats totals[ROWS][VECTORS];
  const float* words[ROWS];
  for (int r = 0; r < ROWS; r++) {
    words[r] = rows[r];
    for (int v = 0; v < VECTORS; v++)
      totals[r][v] = is_first ? zeros() : load(sums + r * stride + v * LANES);
  }
  for (int64_t step = 0; step < steps; ahead.bytes += LINE_BYTES) {
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(ahead.bytes + r * ahead.row_bytes);
    for (const int64_t end = std::min(step + ahead.steps, steps); step < end; step++) {
      Floats vectors[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++, x += LANES) vectors[v] = load(x);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const Floats word = spread(words[r][step]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
          totals[r][v] = Form::multiply(vectors[v], word, totals[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(sums + r * stride + v * LANES, totals[r][v]);
}

}  // namespace
