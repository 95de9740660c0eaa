// Causal attention of a few tokens over the live rows of the cache.
//
// The heads that share keys, and the tokens, are the queries of one pair of row and key head. Its
// cache is cut into chunks, which threads take in any order: of each the largest score, the sum of
// the powers and the weighted sum of the values; the chunks are then merged. Chunks have the same
// ends whatever the number of threads is, and so has the result the same bits.
//
// Source: arXiv 2205.14135, its form for few queries.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "attention.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 256, BLOCK = 16;  // rows of the cache: of a task, and that are widened at once

struct Job : Attention {
  // How many rows a query sees; queries are [token, head of the group].
  int64_t seen(int64_t row, int64_t query) const {
    return std::min(positions[row] + query / group() + 1, cache.num_rows);
  }

  // Of one task's result: [query] largest score, [query] sum of powers, [query, padded] values.
  int64_t num_partial() const { return num_queries() * (2 + padded()); }
  int64_t num_scratch() const {
    return num_queries() * (padded() + CHUNK) + BLOCK * padded();
  }
};

// `count` rows of keys or values as floats, padded with zeros.
void widen(const Job& job, const void* cache, const float* scales, int64_t first, int64_t count,
           float* rows) {
  const int64_t dim = job.queries.head_dim, padded = job.padded();
  if (scales) {
    for (int64_t row = 0; row < count; row++) {
      const int8_t* own = static_cast<const int8_t*>(cache) + (first + row) * dim;
      const float scale = scales[first + row];
      for (int64_t i = 0; i < dim; i++) rows[row * padded + i] = float(own[i]) * scale;
      std::fill(rows + row * padded + dim, rows + (row + 1) * padded, 0.f);
    }
    return;
  }
  if (dim == padded) return to_floats(cache, job.type, first * dim, count * dim, rows);
  for (int64_t row = 0; row < count; row++) {
    to_floats(cache, job.type, (first + row) * dim, dim, rows + row * padded);
    std::fill(rows + row * padded + dim, rows + (row + 1) * padded, 0.f);
  }
}

// The rows first to last of the cache of one row and key head.
void attend_chunk(const Job& job, int64_t row, int64_t head, int64_t first, int64_t last,
                  float* scratch, float* partial) {
  const Queries& given = job.queries;
  const int64_t num_queries = job.num_queries(), padded = job.padded(), group = job.group();
  float *queries = scratch, *rows = queries + num_queries * padded, *scores = rows + BLOCK * padded;
  float *largest = partial, *sums = largest + num_queries, *values = sums + num_queries;
  const int64_t begin = (job.slots[row] * job.cache.num_heads + head) * job.cache.num_rows;

  for (int64_t q = 0; q < num_queries; q++) {
    const int64_t place = row * given.row_stride + (head * group + q % group) * given.head_stride +
                          q / group * given.token_stride;
    float* query = queries + q * padded;
    std::fill(query, query + padded, 0.f);
    to_floats(given.values, job.type, place, given.head_dim, query);
    for (int64_t i = 0; i < given.head_dim; i++) query[i] *= job.scale;
  }
  for (int64_t block = first; block < last; block += BLOCK) {
    const int64_t count = std::min(BLOCK, last - block);
    widen(job, job.cache.keys, job.cache.key_scales, begin + block, count, rows);
    for (int64_t q = 0; q < num_queries; q++)
      for (int64_t r = 0; r < count; r++) {
        Floats total = zeros();
        for (int64_t i = 0; i < padded; i += LANES)
          total = multiply_add(load(queries + q * padded + i), load(rows + r * padded + i), total);
        scores[q * CHUNK + block - first + r] = sum(total);
      }
  }
  for (int64_t q = 0; q < num_queries; q++) {
    float* own = scores + q * CHUNK;
    const int64_t count = std::clamp<int64_t>(job.seen(row, q) - first, 0, last - first);
    float most = LOWEST, total = 0;
    for (int64_t r = 0; r < count; r++) most = std::max(most, own[r]);
    for (int64_t r = 0; r < count; r++) own[r] = exp_of(own[r] - most);
    for (int64_t r = 0; r < count; r++) total += own[r];
    std::fill(own + count, own + (last - first), 0.f);
    largest[q] = most;
    sums[q] = total;
  }
  std::fill(values, values + num_queries * padded, 0.f);
  for (int64_t block = first; block < last; block += BLOCK) {
    const int64_t count = std::min(BLOCK, last - block);
    widen(job, job.cache.values, job.cache.value_scales, begin + block, count, rows);
    for (int64_t q = 0; q < num_queries; q++) {
      const float* own = scores + q * CHUNK + block - first;
      for (int64_t i = 0; i < padded; i += LANES) {
        Floats total = load(values + q * padded + i);
        for (int64_t r = 0; r < count; r++)
          total = multiply_add(spread(own[r]), load(rows + r * padded + i), total);
        store(values + q * padded + i, total);
      }
    }
  }
}

// Of one row and key head, its chunks' results one behind the other; the first becomes their sum.
void merge(const Job& job, int64_t row, int64_t head, int64_t num_chunks, float* partials) {
  const Queries& given = job.queries;
  const int64_t num_queries = job.num_queries(), padded = job.padded(), group = job.group();
  for (int64_t q = 0; q < num_queries; q++) {
    float most = LOWEST, total = 0;
    for (int64_t c = 0; c < num_chunks; c++)
      most = std::max(most, partials[c * job.num_partial() + q]);
    float* values = partials + 2 * num_queries + q * padded;
    for (int64_t c = 0; c < num_chunks; c++) {
      const float* partial = partials + c * job.num_partial();
      const float weight = exp_of(partial[q] - most);
      const float* own = partial + 2 * num_queries + q * padded;
      total += weight * partial[num_queries + q];
      for (int64_t i = 0; i < padded; i++) values[i] = (c ? values[i] : 0) + weight * own[i];
    }
    const int64_t token = row * given.num_tokens + q / group;
    const int64_t place = (token * given.num_heads + head * group + q % group) * given.head_dim;
    for (int64_t i = 0; i < given.head_dim; i++)
      put(job.out, job.type, place + i, values[i] / total);
  }
}

}  // namespace

extern "C" int attend(const Queries* queries, const Cache* cache, const int64_t* positions,
                      const int64_t* slots, double scale, int64_t type, void* out,
                      int64_t num_threads) {
  const Job job{{*queries, *cache, positions, slots, float(scale), type, out}};
  const int64_t num_pairs = queries->num_rows * cache->num_heads;
  int64_t chunks = 0;  // of the longest row
  for (int64_t row = 0; row < queries->num_rows; row++)
    chunks = std::max(chunks, divide_up(job.live(row), CHUNK));
  const int64_t own = num_pairs * chunks * job.num_partial();
  const size_t bytes = size_t(own + num_threads * job.num_scratch()) * 4;
  float* scratch = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!scratch) return 0;
#pragma omp parallel num_threads(int(num_threads))
  {
    float* mine = scratch + own + thread_index() * job.num_scratch();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_pairs * chunks; task++) {
      const int64_t pair = task / chunks, first = task % chunks * CHUNK;
      const int64_t row = pair / cache->num_heads;
      if (const int64_t last = std::min(first + CHUNK, job.live(row)); first < last)
        attend_chunk(job, row, pair % cache->num_heads, first, last, mine,
                     scratch + task * job.num_partial());
    }
#pragma omp for
    for (int64_t pair = 0; pair < num_pairs; pair++) {
      const int64_t row = pair / cache->num_heads;
      merge(job, row, pair % cache->num_heads, divide_up(job.live(row), CHUNK),
            scratch + pair * chunks * job.num_partial());
    }
  }
  std::free(scratch);
  return 1;
}
