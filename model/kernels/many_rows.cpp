// Products of many rows with weights of any kind, at the speed of arithmetic (see tile.h).
//
// A weight that has the form's type is read as it lies; of any other a few rows at a time are
// converted in the cache.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "products.h"
#include "threads.h"
#include "tile.h"
#include "unpack.h"

namespace {

constexpr int64_t ROWS_OF_X = 256;                // that are multiplied before the next ones
constexpr int64_t STRIP = 48;                     // rows of a weight; a multiple of all tiles'
constexpr int64_t X_BYTES = LANES == 16 ? 1 << 19 : 1 << 18;  // that stay in the second cache

// x of one pass: [panel, step, VECTORS * LANES] words, which are COLUMNS columns of a row each.
template <class Form, int VECTORS>
struct Panels {
  static constexpr int64_t LINES = VECTORS * LANES;  // rows of x

  const X& x;
  int64_t num_panels, num_steps;
  float* words;

  explicit Panels(const X& of)
      : x(of),
        num_panels(divide_up(of.num_rows, LINES)),
        num_steps(divide_up(of.width, Form::COLUMNS)) {
    const size_t bytes = size_t(num_panels * num_steps * LINES) * 4;
    words = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  }
  ~Panels() { std::free(words); }

  // Called by all threads.
  void fill() const {
    const int64_t blocks = divide_up(num_steps, LANES), vectors = num_panels * VECTORS;
#pragma omp for
    for (int64_t place = 0; place < vectors * blocks; place++) {
      const int64_t vector = place / blocks, step = place % blocks * LANES;
      const int64_t column = step * Form::COLUMNS;
      const int64_t count = std::min(LANES * Form::COLUMNS, x.width - column);
      float lines[LANES][LANES] = {};
      for (int64_t i = 0; i < LANES && vector * LANES + i < x.num_rows; i++)
        to_type<Form::TYPE>(x.values, x.type, (vector * LANES + i) * x.width + column, count, lines[i]);
      turn(lines[0], num_steps - step,
           words + (vector / VECTORS * num_steps + step) * LINES + vector % VECTORS * LANES, LINES);
    }
  }
};

// Rows a multiple of this apart meet in the same few lines of the first cache.
constexpr int64_t ALIAS_BYTES = 2048, MAX_ALIASES = 8;

// A row's columns `first` to `last` as words: where they lie, or converted into the scratch.
template <class Form, int ROWS>
const float* words_of(const PackedWeight& weight, const X& x, int64_t row, int64_t first,
                      int64_t last, float* scratch) {
  const int64_t place = row * x.width + first, count = last - first;
  if (weight.bits > 8) {
    const bool aliases = ROWS > MAX_ALIASES && x.width * weight.bits / 8 % ALIAS_BYTES == 0;
    if (x.type == Form::TYPE && x.width % Form::COLUMNS == 0 && !aliases)
      return reinterpret_cast<const float*>(weight.packed + place * weight.bits / 8);
    to_type<Form::TYPE>(weight.packed, x.type, place, count, scratch);
  } else if (weight.bits == 8) {
    unpack_columns<8, Form::TYPE>(weight, x.width, row, first, last, scratch);
  } else {
    unpack_columns<4, Form::TYPE>(weight, x.width, row, first, last, scratch);
  }
  if (count % Form::COLUMNS) std::memset(reinterpret_cast<uint16_t*>(scratch) + count, 0, 2);
  return scratch;
}

// The rows first to last of a weight, at most STRIP; `scratch` is the thread's.
template <class Form, int VECTORS>
void multiply_strip(const Panels<Form, VECTORS>& panels, const PackedWeight& weight, int64_t first,
                    int64_t last, int64_t steps_at_once, float* scratch) {
  constexpr int ROWS = TILE_ROWS<VECTORS>;
  constexpr int64_t LINES = Panels<Form, VECTORS>::LINES;
  const X& x = panels.x;
  const int64_t stride = panels.num_panels * LINES, row_bytes = x.width * weight.bits / 8;
  // All panels together fetch a line of the weight while they multiply one.
  const int64_t ahead_steps = panels.num_panels * LINE_BYTES * 8 / weight.bits / Form::COLUMNS;
  float *sums = scratch, *converted = sums + STRIP * stride;
  for (int64_t step = 0; step < panels.num_steps; step += steps_at_once) {
    const int64_t steps = std::min(steps_at_once, panels.num_steps - step);
    const int64_t column = step * Form::COLUMNS;
    const int64_t end = std::min(column + steps * Form::COLUMNS, x.width);
    for (int64_t row = first; row < last; row += ROWS) {
      const float* rows[ROWS];
      for (int r = 0; r < ROWS; r++)
        rows[r] = row + r < last ? words_of<Form, ROWS>(weight, x, row + r, column, end,
                                                        converted + r * (steps_at_once + 16))
                                 : rows[r - 1];
      const uint8_t* next = weight.packed + (row + ROWS) * row_bytes + column * weight.bits / 8;
      for (int64_t panel = 0; panel < panels.num_panels; panel++) {
        const int64_t lines = panel * divide_up(steps, ahead_steps);
        multiply_tile<Form, VECTORS>(
            panels.words + (panel * panels.num_steps + step) * LINES, steps, rows,
            sums + (row - first) * stride + panel * LINES, stride, step == 0,
            {next + lines * LINE_BYTES, row_bytes, ahead_steps});
      }
    }
  }
  for (int64_t m = 0; m < x.num_rows; m += LANES) {
    float results[LANES][STRIP];
    for (int64_t row = 0; row < last - first; row += LANES)
      transpose(sums + row * stride + m, stride, results[0] + row, STRIP);
    for (int64_t i = 0; i < LANES && m + i < x.num_rows; i++)
      from_floats(results[i], x.type, (m + i) * weight.num_rows + first, last - first, weight.out);
  }
}

template <class Form, int VECTORS>
bool multiply(const X& x, const PackedWeight* weights, int64_t num_weights, int64_t num_threads) {
  const Panels<Form, VECTORS> panels(x);
  constexpr int64_t LINES = Panels<Form, VECTORS>::LINES;
  // Columns whose words of x stay in the cache, whole groups of a packed weight.
  constexpr int64_t UNIT = 128 / Form::COLUMNS;
  const int64_t fitting = X_BYTES / (panels.num_panels * LINES * 4) / UNIT * UNIT;
  const int64_t steps_at_once = std::min(std::max(fitting, UNIT), panels.num_steps);
  const int64_t each = STRIP * panels.num_panels * LINES +
                       TILE_ROWS<VECTORS> * (divide_up(steps_at_once, 16) * 16 + 16);
  float* scratch = static_cast<float*>(std::aligned_alloc(64, size_t(num_threads * each) * 4));
  const bool has_memory = panels.words && scratch;
  if (has_memory) {
    RowPieces pieces(weights, num_weights, x.width, num_threads, 1, STRIP,
                     [](const PackedWeight& weight) { return weight.bits; });
#pragma omp parallel num_threads(int(num_threads))
    {
      panels.fill();
      float* own = scratch + thread_index() * each;
      pieces.run([&](int64_t i, int64_t first, int64_t last, int64_t) {
        for (int64_t row = first; row < last; row += STRIP)
          multiply_strip(panels, weights[i], row, std::min(row + STRIP, last), steps_at_once, own);
      });
    }
  }
  std::free(scratch);
  return has_memory;
}

template <class Form, int VECTORS = MAX_VECTORS>
bool multiply_with(int64_t vectors, const X& x, const PackedWeight* weights, int64_t num_weights,
                   int64_t num_threads) {
  if constexpr (VECTORS > 1)
    if (vectors < VECTORS)
      return multiply_with<Form, VECTORS - 1>(vectors, x, weights, num_weights, num_threads);
  return multiply<Form, VECTORS>(x, weights, num_weights, num_threads);
}

}  // namespace

extern "C" int multiply_many(const void* values, int64_t type, int64_t num_x, int64_t width,
                             const PackedWeight* weights, int64_t num_weights,
                             int64_t num_threads) {
  const int64_t x_bytes = type == FLOAT32 ? 4 : 2;
  std::vector<PackedWeight> parts(weights, weights + num_weights);
  for (int64_t first = 0; first < num_x; first += ROWS_OF_X) {
    const X x{static_cast<const char*>(values) + first * width * x_bytes, type,
              std::min(ROWS_OF_X, num_x - first), width};
    for (int64_t i = 0; i < num_weights; i++)
      parts[size_t(i)].out =
          static_cast<char*>(weights[i].out) + first * weights[i].num_rows * x_bytes;
    // Panels of as many vectors each.
    const int64_t all = divide_up(x.num_rows, LANES), panels = divide_up(all, MAX_VECTORS);
    const int64_t vectors = divide_up(all, panels);
#ifdef LLAMAC_BRAINS
    if (type == BFLOAT16) {
      if (!multiply_with<BrainForm>(vectors, x, parts.data(), num_weights, num_threads)) return 0;
      continue;
    }
#endif
    if (!multiply_with<FloatForm>(vectors, x, parts.data(), num_weights, num_threads)) return 0;
  }
  return 1;
}
