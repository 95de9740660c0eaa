// What attention is called with, whatever the number of its tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "vectors.h"

namespace {

constexpr float LOWEST = -3.0e38f;  // below any score

struct Attention {
  const Queries& queries;
  const Cache& cache;
  const int64_t *positions, *slots;
  float scale;
  int64_t type;
  void* out;

  int64_t padded() const { return divide_up(queries.head_dim, LANES) * LANES; }
  int64_t group() const { return queries.num_heads / cache.num_heads; }
  int64_t num_queries() const { return group() * queries.num_tokens; }
  // How many rows of the cache any of a row's queries sees.
  int64_t live(int64_t row) const {
    return std::min(positions[row] + queries.num_tokens, cache.num_rows);
  }
};

}  // namespace
