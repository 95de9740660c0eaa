// What the library does, on plain pointers: for Python's ctypes and for torch's operators alike.
//
// Types of numbers are those of numbers.h. A product's num_x is 1 to 16 and its result
// [num_x, num_rows] of x's type. A function that returns an int returns whether there was memory.
#pragma once

#include <cstdint>

// packed_product.py says what one is. Of int64 alone, as it is filled there.
struct PackedWeight {
  const uint8_t* packed;
  const void* scale;
  const void* minimum;  // or null
  void* out;
  int64_t num_rows, bits, group, scale_type, minimum_type;
};
static_assert(sizeof(PackedWeight) == 9 * sizeof(int64_t), "a table of int64");

struct DenseWeight {
  const void* values;  // [num_rows, width] of x's type
  void* out;
  int64_t num_rows;
};

// [rows, heads, tokens, head_dim] in elements; the last stride is 1.
struct Queries {
  const void* values;
  int64_t num_rows, num_heads, num_tokens, head_dim;
  int64_t row_stride, head_stride, token_stride;
};

// [slots, num_heads, num_rows, head_dim], contiguous, of the queries' type; or int8, with scales
// [slots, num_heads, num_rows].
struct Cache {
  const void *keys, *values;
  const float *key_scales, *value_scales;  // or null
  int64_t num_heads, num_rows;
};

extern "C" {

// Products of x [num_x, width] with each weight, into its out.
int multiply_dense(const void* x, int64_t type, int64_t num_x, int64_t width,
                   const DenseWeight* weights, int64_t num_weights, int64_t num_threads);
int multiply_packed(const void* x, int64_t type, int64_t num_x, int64_t width,
                    const PackedWeight* weights, int64_t num_weights, int64_t num_threads);

// The weight's numbers into its out, [num_rows, width] of a type.
void unpack(const PackedWeight* weight, int64_t width, int64_t type, int64_t num_threads);

// Causal attention of a few tokens, as live_attention.py has it; out is [rows, tokens, heads,
// head_dim], contiguous, of the queries' type.
int attend(const Queries* queries, const Cache* cache, const int64_t* positions,
           const int64_t* slots, double scale, int64_t type, void* out, int64_t num_threads);
}
