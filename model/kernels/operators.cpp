// The library's functions as torch's operators, which few_rows.py declares.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "numbers.h"
#include "products.h"

namespace {

using at::Tensor;
using at::TensorList;
using Options = c10::List<std::optional<Tensor>>;

constexpr int64_t MAX_ROWS = 16;

int64_t type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return FLOAT32;
    case at::kBFloat16: return BFLOAT16;
    case at::kHalf: return FLOAT16;
    default: TORCH_CHECK(false, "numbers of ", tensor.scalar_type(), "; only floats are supported");
  }
}

// The given sizes of a contiguous tensor; a negative one is any.
void check(const Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  bool fits = tensor.is_contiguous() && tensor.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); i++) fits = sizes[i] < 0 || tensor.size(i) == sizes[i];
  TORCH_CHECK(fits, name, " is ", tensor.sizes(), ", or not contiguous; it must be ", sizes);
}

void check_memory(int had) { TORCH_CHECK(had, "no memory for a product's scratch"); }

void check_rows(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(0) >= 1 && x.size(0) <= MAX_ROWS,
              "x is ", x.sizes(), ", or not contiguous; it must be 1 to 16 rows");
}

void check_dtype(const Tensor& tensor, const Tensor& x, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, "'s dtype is ", tensor.scalar_type(),
              "; it must be x's, ", x.scalar_type());
}

std::vector<Tensor> empty_results(const Tensor& x, TensorList weights) {
  check_rows(x);
  std::vector<Tensor> outs;
  for (const Tensor& weight : weights)
    outs.push_back(at::empty({x.size(0), weight.size(0)}, x.options()));
  return outs;
}

std::vector<Tensor> multiply_few(const Tensor& x, TensorList weights) {
  std::vector<Tensor> outs = empty_results(x, weights);
  std::vector<DenseWeight> table;
  for (size_t i = 0; i < outs.size(); i++) {
    check(weights[i], {-1, x.size(1)}, "a weight");
    check_dtype(weights[i], x, "a weight");
    table.push_back({weights[i].const_data_ptr(), outs[i].mutable_data_ptr(), weights[i].size(0)});
  }
  check_memory(multiply_dense(x.const_data_ptr(), type_of(x), x.size(0), x.size(1), table.data(),
                              int64_t(table.size()), at::get_num_threads()));
  return outs;
}

PackedWeight packed_weight(const Tensor& packed, const Tensor& scale, const Tensor* minimum,
                           int64_t width) {
  const int64_t num_rows = packed.size(0), bits = 8 * packed.size(1) / width;
  const int64_t groups = scale.size(1);
  TORCH_CHECK(bits == 4 || bits == 8, "a weight of ", bits, " bits");
  check(packed, {num_rows, width * bits / 8}, "a packed weight");
  check(scale, {num_rows, groups}, "a scale");
  if (minimum) check(*minimum, {num_rows, groups}, "a minimum");
  return {packed.const_data_ptr<uint8_t>(), scale.const_data_ptr(),
          minimum ? minimum->const_data_ptr() : nullptr, nullptr, num_rows, bits, width / groups,
          type_of(scale), minimum ? type_of(*minimum) : FLOAT32};
}

std::vector<Tensor> multiply_few_packed(const Tensor& x, TensorList packed, TensorList scales,
                                        TensorList minima) {
  std::vector<Tensor> outs = empty_results(x, packed);
  std::vector<PackedWeight> table;
  for (size_t i = 0; i < outs.size(); i++) {
    const bool has_minimum = !minima.empty() && minima[i].numel() > 0;
    table.push_back(packed_weight(packed[i], scales[i], has_minimum ? &minima[i] : nullptr, x.size(1)));
    table.back().out = outs[i].mutable_data_ptr();
  }
  check_memory(multiply_packed(x.const_data_ptr(), type_of(x), x.size(0), x.size(1), table.data(),
                               int64_t(table.size()), at::get_num_threads()));
  return outs;
}

// The cache of keys and values of a dtype, or of int8 with their scales.
Cache cache_of(TensorList buffers, int64_t dim, at::ScalarType dtype) {
  const Tensor &keys = buffers[0], &values = buffers[1];
  check(keys, {-1, -1, -1, dim}, "the keys' cache");
  check(values, keys.sizes(), "the values' cache");
  const bool is_scaled = buffers.size() > 2;
  const auto stored = is_scaled ? at::kChar : dtype;
  TORCH_CHECK(keys.scalar_type() == stored && values.scalar_type() == stored,
              "the cache is of ", keys.scalar_type(), "; it must be of ", stored);
  for (const Tensor& scales : buffers.slice(2)) check(scales, keys.sizes().slice(0, 3), "scales");
  const auto scale = [&](size_t i) {
    return is_scaled ? buffers[i].mutable_data_ptr<float>() : nullptr;
  };
  return {keys.mutable_data_ptr(), values.mutable_data_ptr(), scale(2), scale(3), keys.size(1),
          keys.size(2)};
}

Tensor attend_in_cpp(const Tensor& q, TensorList buffers, const Tensor& positions,
                  const Tensor& slots, double scale) {
  TORCH_CHECK(q.dim() == 4 && q.stride(3) == 1, "queries must be [B, H, T, D], of whole heads");
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  check(positions, {batch}, "positions");
  check(slots, {batch}, "slots");
  const Cache cache = cache_of(buffers, dim, q.scalar_type());
  Tensor out = at::empty({batch, tokens, heads, dim}, q.options());
  const Queries queries{q.const_data_ptr(), batch,       heads,      tokens, dim,
                        q.stride(0),        q.stride(1), q.stride(2)};
  const auto call = tokens <= MAX_ROWS ? attend : attend_many;
  check_memory(call(&queries, &cache, positions.const_data_ptr<int64_t>(),
                    slots.const_data_ptr<int64_t>(), scale, type_of(q), out.mutable_data_ptr(),
                    at::get_num_threads()));
  return out;
}

constexpr size_t NUM_NORMS = 2, NUM_PRODUCTS = 7;

// What the lists have of one layer, and its part of the cache.
Layer layer_of(size_t index, const Tensor& hidden, TensorList norms, double eps, TensorList weights,
               const Options& scales, const Options& minima, const Options& biases, double scale,
               const Cache& cache, int64_t dim) {
  const int64_t width = hidden.size(1);
  norms = norms.slice(index * NUM_NORMS, NUM_NORMS);
  weights = weights.slice(index * NUM_PRODUCTS, NUM_PRODUCTS);
  for (const Tensor& norm : norms) {
    check(norm, {width}, "a norm");
    check_dtype(norm, hidden, "a norm");
  }
  Layer layer{norms[0].const_data_ptr(), norms[1].const_data_ptr(), float(eps), scale, {}};
  const int64_t inner = weights[4].size(0), attended = weights[0].size(0);
  const int64_t widths[] = {width, width, width, attended, width, width, inner};
  const int64_t kept = cache.num_heads * dim;
  TORCH_CHECK(attended % kept == 0, attended, " rows of queries; it must be a multiple of ", kept);
  const int64_t sizes[] = {-1, kept, kept, width, -1, inner, width};
  for (size_t i = 0; i < NUM_PRODUCTS; i++) {
    const size_t at = index * NUM_PRODUCTS + i;
    const std::optional<Tensor> packed_scale = scales.get(at), minimum = minima.get(at),
                                bias = biases.get(at);
    PackedWeight& weight = layer.products[i].weight;
    if (packed_scale) {
      weight = packed_weight(weights[i], *packed_scale, minimum ? &*minimum : nullptr, widths[i]);
    } else {
      check(weights[i], {-1, widths[i]}, "a weight");
      check_dtype(weights[i], hidden, "a weight");
      weight.packed = static_cast<const uint8_t*>(weights[i].const_data_ptr());
      weight.num_rows = weights[i].size(0);
      weight.bits = 8 * weights[i].element_size();
    }
    TORCH_CHECK(sizes[i] < 0 || weight.num_rows == sizes[i], "a weight of ", weight.num_rows,
                " rows; it must have ", sizes[i]);
    if (bias) {
      check(*bias, {weight.num_rows}, "a bias");
      check_dtype(*bias, hidden, "a bias");
    }
    layer.products[i].bias = bias ? bias->const_data_ptr() : nullptr;
  }
  return layer;
}

Tensor layers_few(const Tensor& hidden, TensorList norms, double eps, TensorList weights,
                  const Options& scales, const Options& minima, const Options& biases,
                  const Tensor& cos, const Tensor& sin, const Tensor& positions,
                  const Tensor& write_indices, const Tensor& slots, double scale,
                  TensorList buffers) {
  check_rows(hidden);
  const size_t num_layers = norms.size() / NUM_NORMS, num_products = num_layers * NUM_PRODUCTS;
  TORCH_CHECK(num_layers > 0 && weights.size() == num_products && scales.size() == num_products &&
                  minima.size() == num_products && biases.size() == num_products &&
                  buffers.size() % num_layers == 0,
              "the lists are not of as many layers");
  const size_t num_buffers = buffers.size() / num_layers;
  const int64_t num_x = hidden.size(0), width = hidden.size(1), batch = positions.size(0);
  const int64_t tokens = num_x / batch, dim = buffers[0].size(3);
  check(hidden, {batch * tokens, width}, "hidden states");
  for (const Tensor* table : {&cos, &sin}) check(*table, {batch, tokens, dim / 2}, "cos or sin");
  for (const Tensor* index : {&write_indices, &slots}) check(*index, {batch}, "an index");
  const int64_t *rows = write_indices.const_data_ptr<int64_t>(),
                *owners = slots.const_data_ptr<int64_t>();
  std::vector<Layer> layers;  // all of them, so that no cache is written if one is refused
  std::vector<Cache> caches;
  for (size_t layer = 0; layer < num_layers; layer++) {
    const TensorList own = buffers.slice(layer * num_buffers, num_buffers);
    const Cache cache = cache_of(own, dim, hidden.scalar_type());
    for (int64_t i = 0; i < batch; i++)
      TORCH_CHECK(rows[i] >= 0 && rows[i] + tokens <= cache.num_rows && owners[i] >= 0 &&
                      owners[i] < own[0].size(0),
                  "row ", rows[i], " of slot ", owners[i], " is outside the cache");
    caches.push_back(cache);
    layers.push_back(layer_of(layer, hidden, norms, eps, weights, scales, minima, biases, scale,
                              cache, dim));
  }
  Tensor outs[] = {at::empty(hidden.sizes(), hidden.options()),
                   at::empty(hidden.sizes(), hidden.options())};
  const void* from = hidden.const_data_ptr();
  for (size_t layer = 0; layer < num_layers; layer++) {
    const Tokens given{from, type_of(hidden), batch, tokens, width, dim,
                       cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
                       positions.const_data_ptr<int64_t>(), rows, owners, caches[layer]};
    void* out = outs[layer % 2].mutable_data_ptr();
    check_memory(run_layer(&layers[layer], &given, out, at::get_num_threads()));
    from = out;
  }
  return outs[(num_layers - 1) % 2];
}

}  // namespace

TORCH_LIBRARY_IMPL(llamac, CPU, library) {
  library.impl("multiply_few", multiply_few);
  library.impl("multiply_few_packed", multiply_few_packed);
  library.impl("attend_in_cpp", attend_in_cpp);
  library.impl("layers_few", layers_few);
}
