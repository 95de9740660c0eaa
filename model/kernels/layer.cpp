// A decoder layer on a few tokens, whose time is that of reading its weights and its cache.
//
// What lies between the products is little: it is done here so that nothing else is called for it.
// Results are rounded to the type of the hidden states where a product or the cache takes them.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

enum { Q, K, V, O, GATE, UP, DOWN };

constexpr float TINY = 1.17549435e-38f, LARGEST = 127;  // of a row's scale, and in int8
constexpr int64_t BLOCK = 512;  // numbers that are widened at once

struct Job {
  const Layer& layer;
  const Tokens& tokens;
  int num_threads;

  int64_t num_rows() const { return tokens.num_rows * tokens.num_tokens; }
  int64_t num_heads(int product) const { return columns(product) / tokens.head_dim; }
  int64_t columns(int product) const { return layer.products[product].weight.num_rows; }
  size_t bytes(int64_t count) const { return size_t(count) * (tokens.type == FLOAT32 ? 4 : 2); }
};

// Memory of one call, in lines of the cache.
class Scratch {
 public:
  ~Scratch() {
    for (void* part : parts_) std::free(part);
  }
  void* take(size_t bytes) {
    parts_.push_back(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    return parts_.back();
  }

 private:
  std::vector<void*> parts_;
};

// The root of the mean square, then the gain; in float32.
void normalize(const Job& job, const void* hidden, const void* gain, void* out) {
  const int64_t width = job.tokens.width, type = job.tokens.type;
#pragma omp parallel for num_threads(job.num_threads) if (job.num_rows() > 1)
  for (int64_t row = 0; row < job.num_rows(); row++) {
    float values[BLOCK], gains[BLOCK], lanes[LANES] = {};
    for (int64_t first = 0; first < width; first += BLOCK) {
      const int64_t count = std::min(BLOCK, width - first);
      to_floats(hidden, type, row * width + first, count, values);
      std::fill(values + count, values + divide_up(count, LANES) * LANES, 0.f);
      Floats total = load(lanes);
      for (int64_t i = 0; i < count; i += LANES)
        total = multiply_add(load(values + i), load(values + i), total);
      store(lanes, total);
    }
    const float mean = sum(load(lanes)) / float(width);
    const float factor = 1 / std::sqrt(mean + job.layer.eps);
    for (int64_t first = 0; first < width; first += BLOCK) {
      const int64_t count = std::min(BLOCK, width - first);
      to_floats(hidden, type, row * width + first, count, values);
      to_floats(gain, type, first, count, gains);
      for (int64_t i = 0; i < count; i++) values[i] = values[i] * factor * gains[i];
      from_floats(values, type, row * width + first, count, out);
    }
  }
}

// Products of x with the weights `first` to `last`, each into its out.
bool multiply(const Job& job, const void* x, int64_t width, int first, int last, void* const* outs) {
  const auto kind = [&](int i) { return job.layer.products[i].weight.bits; };
  for (int begin = first, end; begin <= last; begin = end) {
    PackedWeight packed[DOWN + 1];
    DenseWeight dense[DOWN + 1];
    const auto is_dense = [&](int i) { return kind(i) > 8; };
    for (end = begin; end <= last && is_dense(end) == is_dense(begin); end++) {
      const PackedWeight& weight = job.layer.products[end].weight;
      packed[end - begin] = weight;
      packed[end - begin].out = outs[end - first];
      dense[end - begin] = {weight.packed, outs[end - first], weight.num_rows};
    }
    const int64_t rows = job.num_rows(), type = job.tokens.type, count = end - begin;
    if (!(is_dense(begin)
              ? multiply_dense(x, type, rows, width, dense, count, job.num_threads)
              : multiply_packed(x, type, rows, width, packed, count, job.num_threads)))
      return false;
  }
  return true;
}

// out += other, which a bias is for every row.
void add(const Job& job, void* out, const void* other, int64_t columns, bool is_bias) {
  const int64_t type = job.tokens.type;
  float sums[BLOCK], terms[BLOCK];
  for (int64_t row = 0; other && row < job.num_rows(); row++)
    for (int64_t first = 0; first < columns; first += BLOCK) {
      const int64_t count = std::min(BLOCK, columns - first);
      to_floats(out, type, row * columns + first, count, sums);
      to_floats(other, type, (is_bias ? 0 : row * columns) + first, count, terms);
      for (int64_t i = 0; i < count; i++) sums[i] += terms[i];
      from_floats(sums, type, row * columns + first, count, out);
    }
}

// A head's row rotated: dimension i pairs with i + D/2.
void rotate(const Job& job, int64_t row, const float* head, float* out) {
  const int64_t half = job.tokens.head_dim / 2;
  const float *cos = job.tokens.cos + row * half, *sin = job.tokens.sin + row * half;
  for (int64_t i = 0; i < half; i++) {
    out[i] = head[i] * cos[i] - head[half + i] * sin[i];
    out[half + i] = head[half + i] * cos[i] + head[i] * sin[i];
  }
}

// A row of keys or values into the cache; in int8 what was rounded to the hidden states' type.
void write(const Job& job, const float* head, void* cache, float* scales, int64_t place) {
  const int64_t dim = job.tokens.head_dim, type = job.tokens.type;
  if (!scales) return from_floats(head, type, place * dim, dim, cache);
  std::vector<float> values(head, head + dim);
  if (type != FLOAT32) {
    std::vector<uint16_t> rounded(values.size());
    from_floats(head, type, 0, dim, rounded.data());
    to_floats(rounded.data(), type, 0, dim, values.data());
  }
  float largest = 0;  // or no number, if one of them is none: then the row stays so by its scale
  for (float value : values)
    if (largest == largest && !(std::fabs(value) <= largest)) largest = std::fabs(value);
  const float scale = std::max(largest / LARGEST, TINY);
  for (int64_t i = 0; i < dim; i++)
    static_cast<int8_t*>(cache)[place * dim + i] =
        std::isfinite(largest) ? int8_t(std::nearbyint(values[size_t(i)] / scale)) : int8_t(0);
  scales[place] = scale;
}

// Rotates queries in place, and keys on their way into the cache.
void rotate_and_write(const Job& job, void* q, const void* k, const void* v) {
  const Tokens& tokens = job.tokens;
  const int64_t dim = tokens.head_dim, heads = job.num_heads(Q), kv_heads = job.num_heads(K);
#pragma omp parallel for num_threads(job.num_threads) if (job.num_rows() > 2)
  for (int64_t row = 0; row < job.num_rows(); row++) {
    std::vector<float> head(dim), out(dim);
    for (int64_t h = 0; h < heads; h++) {
      to_floats(q, tokens.type, (row * heads + h) * dim, dim, head.data());
      rotate(job, row, head.data(), out.data());
      from_floats(out.data(), tokens.type, (row * heads + h) * dim, dim, q);
    }
    const int64_t slot = tokens.slots[row / tokens.num_tokens];
    const int64_t at = tokens.write_indices[row / tokens.num_tokens] + row % tokens.num_tokens;
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t place = (slot * kv_heads + h) * tokens.cache.num_rows + at;
      to_floats(k, tokens.type, (row * kv_heads + h) * dim, dim, head.data());
      rotate(job, row, head.data(), out.data());
      write(job, out.data(), tokens.cache.keys, tokens.cache.key_scales, place);
      to_floats(v, tokens.type, (row * kv_heads + h) * dim, dim, head.data());
      write(job, head.data(), tokens.cache.values, tokens.cache.value_scales, place);
    }
  }
}

// gate = silu(gate) * up.
void activate(const Job& job, void* gate, const void* up) {
  const int64_t type = job.tokens.type, count = job.num_rows() * job.columns(GATE);
#pragma omp parallel for num_threads(job.num_threads) if (job.num_rows() > 1)
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t length = std::min(BLOCK, count - first);
    float gates[BLOCK], ups[BLOCK];
    to_floats(gate, type, first, length, gates);
    to_floats(up, type, first, length, ups);
    for (int64_t i = 0; i < length; i++) {
      const float power = exp_of(-std::fabs(gates[i]));  // 1 / (1 + e^-x), of either sign
      gates[i] *= ups[i] * ((gates[i] < 0 ? power : 1.f) / (1.f + power));
    }
    from_floats(gates, type, first, length, gate);
  }
}

}  // namespace

extern "C" int run_layer(const Layer* layer, const Tokens* tokens, void* out, int64_t num_threads) {
  const Job job{*layer, *tokens, int(num_threads)};
  const int64_t width = tokens->width, rows = job.num_rows(), attended = job.columns(Q);
  Scratch scratch;
  void *normed = scratch.take(job.bytes(rows * width)), *outs[DOWN + 1];
  void* heads = scratch.take(job.bytes(rows * attended));
  bool had = normed && heads;
  for (int i = Q; i < DOWN; i++)
    had = (outs[i] = scratch.take(job.bytes(rows * job.columns(i)))) && had;
  outs[DOWN] = out;
  const auto project = [&](const void* x, int64_t columns, int first, int last) {
    had = had && multiply(job, x, columns, first, last, outs + first);
    for (int i = first; had && i <= last; i++)
      add(job, outs[i], layer->products[i].bias, job.columns(i), true);
  };
  if (!had) return 0;
  normalize(job, tokens->hidden, layer->input_norm, normed);
  project(normed, width, Q, V);
  if (!had) return 0;
  rotate_and_write(job, outs[Q], outs[K], outs[V]);
  const int64_t dim = tokens->head_dim, length = tokens->num_tokens;
  const Queries queries{outs[Q], tokens->num_rows,  job.num_heads(Q), length, dim,
                        length * attended, dim, attended};
  had = attend(&queries, &tokens->cache, tokens->positions, tokens->slots, layer->scale,
               tokens->type, heads, num_threads);
  project(heads, attended, O, O);
  if (!had) return 0;
  add(job, outs[O], tokens->hidden, width, false);
  normalize(job, outs[O], layer->attention_norm, normed);
  project(normed, width, GATE, UP);
  if (!had) return 0;
  activate(job, outs[GATE], outs[UP]);
  project(outs[GATE], job.columns(GATE), DOWN, DOWN);
  if (had) add(job, out, outs[O], width, false);
  return had;
}
