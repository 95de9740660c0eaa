// Packed weights' numbers; packed_product.py says what a packed weight is.
#include <algorithm>
#include <cstdint>

#include "products.h"
#include "vectors.h"

namespace {

template <int TYPE>
inline void store_as(void* to, int64_t index, Floats value) {
  if (TYPE == FLOAT32) store(static_cast<float*>(to) + index, value);
  else if (TYPE == BFLOAT16) store_brains(static_cast<uint16_t*>(to) + index, value);
  else store_halves(static_cast<uint16_t*>(to) + index, value);
}

template <int BITS, int TYPE>
void unpack_row(const PackedWeight& weight, int64_t width, int64_t row, void* out) {
  constexpr int64_t AT_ONCE = 64;  // groups
  const int64_t groups = width / weight.group;
  const uint8_t* packed = weight.packed + row * (width * BITS / 8);
  for (int64_t first = 0; first < groups; first += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, groups - first), place = row * groups + first;
    float scales[AT_ONCE], minima[AT_ONCE];
    to_floats(weight.scale, weight.scale_type, place, count, scales);
    if (weight.minimum) to_floats(weight.minimum, weight.minimum_type, place, count, minima);
    for (int64_t i = 0; i < count; i++) {
      // Exact: the zero point is a power of two.
      const float scale = scales[i];
      const float offset = weight.minimum ? minima[i] : -float(1 << (BITS - 1)) * scale;
      int64_t column = (first + i) * weight.group;
      const int64_t end = column + weight.group;
      const auto unpack = [&](int64_t at) __attribute__((always_inline)) {
        const uint8_t* from = packed + uint64_t(at) * BITS / 8;
        const Floats fields = BITS == 4 ? load_fields4(from) : load_fields8(from);
        store_as<TYPE>(out, at, multiply_add(fields, spread(scale), spread(offset)));
      };
      for (; column + 32 <= end; column += 32)
#pragma GCC unroll 4
        for (int64_t at = 0; at < 32; at += LANES) unpack(column + at);
      for (; column + LANES <= end; column += LANES) unpack(column);
      for (; column < end; column++) {
        const uint8_t byte = packed[uint64_t(column) * BITS / 8];
        const int field = BITS == 8 ? byte : byte >> (column % 2 * 4) & 15;
        put(out, TYPE, column, float(field) * scale + offset);
      }
    }
  }
}

template <int BITS>
void unpack_row(const PackedWeight& weight, int64_t width, int64_t row, int64_t type, void* out) {
  if (type == FLOAT32) unpack_row<BITS, FLOAT32>(weight, width, row, out);
  else if (type == BFLOAT16) unpack_row<BITS, BFLOAT16>(weight, width, row, out);
  else unpack_row<BITS, FLOAT16>(weight, width, row, out);
}

}  // namespace

extern "C" void unpack(const PackedWeight* weight, int64_t width, int64_t type, int64_t num_threads) {
  const int64_t row_bytes = width * (type == FLOAT32 ? 4 : 2);
#pragma omp parallel for num_threads(int(num_threads))
  for (int64_t row = 0; row < weight->num_rows; row++) {
    void* out = static_cast<char*>(weight->out) + row * row_bytes;
    if (weight->bits == 8) unpack_row<8>(*weight, width, row, type, out);
    else unpack_row<4>(*weight, width, row, type, out);
  }
}
