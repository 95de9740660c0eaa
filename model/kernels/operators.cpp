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

std::vector<Tensor> empty_results(const Tensor& x, TensorList weights) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(0) >= 1 && x.size(0) <= 16,
              "x is ", x.sizes(), ", or not contiguous; it must be 1 to 16 rows");
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
    TORCH_CHECK(weights[i].scalar_type() == x.scalar_type(), "a weight's dtype is not x's");
    table.push_back({weights[i].const_data_ptr(), outs[i].mutable_data_ptr(), weights[i].size(0)});
  }
  check_memory(multiply_dense(x.const_data_ptr(), type_of(x), x.size(0), x.size(1), table.data(),
                              int64_t(table.size()), at::get_num_threads()));
  return outs;
}

std::vector<Tensor> multiply_few_packed(const Tensor& x, TensorList packed, TensorList scales,
                                        TensorList minima) {
  std::vector<Tensor> outs = empty_results(x, packed);
  std::vector<PackedWeight> table;
  for (size_t i = 0; i < outs.size(); i++) {
    const int64_t num_rows = packed[i].size(0), width = x.size(1);
    const int64_t bits = 8 * packed[i].size(1) / width, groups = scales[i].size(1);
    TORCH_CHECK(bits == 4 || bits == 8, "a weight of ", bits, " bits");
    check(packed[i], {num_rows, width * bits / 8}, "a packed weight");
    check(scales[i], {num_rows, groups}, "a scale");
    const Tensor* minimum = minima.empty() || minima[i].numel() == 0 ? nullptr : &minima[i];
    if (minimum) check(*minimum, {num_rows, groups}, "a minimum");
    table.push_back({packed[i].const_data_ptr<uint8_t>(), scales[i].const_data_ptr(),
                     minimum ? minimum->const_data_ptr() : nullptr, outs[i].mutable_data_ptr(),
                     num_rows, bits, width / groups, type_of(scales[i]),
                     minimum ? type_of(*minimum) : FLOAT32});
  }
  check_memory(multiply_packed(x.const_data_ptr(), type_of(x), x.size(0), x.size(1), table.data(),
                               int64_t(table.size()), at::get_num_threads()));
  return outs;
}

Tensor attend_few(const Tensor& q, const Tensor& keys, const Tensor& values,
                  const Tensor& positions, const Tensor& slots, double scale,
                  const std::optional<Tensor>& key_scales,
                  const std::optional<Tensor>& value_scales) {
  TORCH_CHECK(q.dim() == 4 && q.stride(3) == 1, "queries must be [B, H, T, D], of whole heads");
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  check(keys, {-1, -1, -1, dim}, "the keys' cache");
  check(values, keys.sizes(), "the values' cache");
  check(positions, {batch}, "positions");
  check(slots, {batch}, "slots");
  const float *key_scale = nullptr, *value_scale = nullptr;
  if (key_scales && value_scales) {
    check(*key_scales, keys.sizes().slice(0, 3), "the keys' scales");
    check(*value_scales, keys.sizes().slice(0, 3), "the values' scales");
    key_scale = key_scales->const_data_ptr<float>();
    value_scale = value_scales->const_data_ptr<float>();
  }
  const auto stored = key_scale ? at::kChar : q.scalar_type();
  TORCH_CHECK(keys.scalar_type() == stored && values.scalar_type() == stored,
              "the cache is of ", keys.scalar_type(), "; it must be of ", stored);
  Tensor out = at::empty({batch, tokens, heads, dim}, q.options());
  const Queries queries{q.const_data_ptr(), batch,       heads,      tokens, dim,
                        q.stride(0),        q.stride(1), q.stride(2)};
  const Cache cache{keys.const_data_ptr(), values.const_data_ptr(), key_scale,
                    value_scale,           keys.size(1),            keys.size(2)};
  check_memory(attend(&queries, &cache, positions.const_data_ptr<int64_t>(),
                      slots.const_data_ptr<int64_t>(), scale, type_of(q), out.mutable_data_ptr(),
                      at::get_num_threads()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(llamac, CPU, library) {
  library.impl("multiply_few", multiply_few);
  library.impl("multiply_few_packed", multiply_few_packed);
  library.impl("attend_few", attend_few);
}
