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
  void *keys, *values;
  float *key_scales, *value_scales;  // or null
  int64_t num_heads, num_rows;
};

// What a layer is called with; of float32, bfloat16 or float16, as its norms and its cache are.
struct Tokens {
  const void* hidden;  // [num_rows * num_tokens, width]
  int64_t type, num_rows, num_tokens, width, head_dim;
  const float *cos, *sin;                           // [num_rows * num_tokens, head_dim / 2]
  const int64_t *positions, *write_indices, *slots;  // [num_rows]
  Cache cache;
};

// A weight without scales is of `bits` 16 or 32, of the hidden states' type.
struct Product {
  PackedWeight weight;
  const void* bias;  // or null
};

struct Layer {
  const void *input_norm, *attention_norm;
  float eps;
  double scale;  // of queries times keys
  Product products[7];  // q, k, v, o, gate, up, down
};

extern "C" {

// Products of x [num_x, width] with each weight, into its out.
int multiply_dense(const void* x, int64_t type, int64_t num_x, int64_t width,
                   const DenseWeight* weights, int64_t num_weights, int64_t num_threads);
int multiply_packed(const void* x, int64_t type, int64_t num_x, int64_t width,
                    const PackedWeight* weights, int64_t num_weights, int64_t num_threads);

// The same for any num_x, of weights that are packed or, of `bits` 16 or 32, numbers of x's type.
int multiply_many(const void* x, int64_t type, int64_t num_x, int64_t width,
                  const PackedWeight* weights, int64_t num_weights, int64_t num_threads);

// The weight's numbers into its out, [num_rows, width] of a type.
void unpack(const PackedWeight* weight, int64_t width, int64_t type, int64_t num_threads);

// Causal attention of a few tokens, as live_attention.py has it; out is [rows, tokens, heads,
// head_dim], contiguous, of the queries' type.
int attend(const Queries* queries, const Cache* cache, const int64_t* positions,
           const int64_t* slots, double scale, int64_t type, void* out, int64_t num_threads);

// The same of any number of tokens, which is faster from some 16 on.
int attend_many(const Queries* queries, const Cache* cache, const int64_t* positions,
                const int64_t* slots, double scale, int64_t type, void* out, int64_t num_threads);

// The tokens through a decoder layer, their keys and values into its cache; out is like hidden.
int run_layer(const Layer* layer, const Tokens* tokens, void* out, int64_t num_threads);
}
