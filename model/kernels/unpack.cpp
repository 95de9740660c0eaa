// A whole packed weight's numbers.
#include "unpack.h"

extern "C" void unpack(const PackedWeight* weight, int64_t width, int64_t type, int64_t num_threads) {
  const int64_t row_bytes = width * (type == FLOAT32 ? 4 : 2);
#pragma omp parallel for num_threads(int(num_threads))
  for (int64_t row = 0; row < weight->num_rows; row++) {
    void* out = static_cast<char*>(weight->out) + row * row_bytes;
    if (weight->bits == 8) unpack_columns<8>(*weight, width, row, 0, width, type, out);
    else unpack_columns<4>(*weight, width, row, 0, width, type, out);
  }
}
