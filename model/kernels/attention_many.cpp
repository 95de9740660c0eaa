// Causal attention of many tokens, at the speed of its products (see tile.h).
//
// A panel's lanes are queries of heads that share keys, a head's tokens one behind the other. It
// takes the rows that it sees in chunks: their scores [row, lane], which become powers, and the sums
// of values [column, lane], which shrink where a chunk has a larger score.
//
// Source: arXiv 2205.14135.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "threads.h"
#include "tile.h"

namespace {

constexpr int64_t CHUNK = 128;  // rows of the cache
constexpr int64_t SPARE = 16;   // rows that a tile may write behind the last

// Two numbers as a word of bfloat16, the first one in the lower half.
inline float pair_of(float first, float second) {
  const auto rounded = [](float value) {
    const uint32_t bits = to_bits(value);
    return bits + 0x7FFF + (bits >> 16 & 1);
  };
  return from_bits(rounded(first) >> 16 | (rounded(second) & 0xFFFF0000));
}

template <class Form, int VECTORS>
struct Job : Attention {
  static constexpr int64_t LINES = VECTORS * LANES, COLUMNS = Form::COLUMNS;
  static constexpr int64_t CHUNK_STEPS = CHUNK / COLUMNS;

  int64_t dim() const { return queries.head_dim; }
  int64_t steps() const { return divide_up(dim(), COLUMNS); }
  int64_t num_panels() const { return divide_up(num_queries(), LINES); }
  // The last row that a query sees.
  int64_t limit(int64_t row, int64_t query) const {
    const int64_t token = std::min(query, num_queries() - 1) % queries.num_tokens;
    return std::min(positions[row] + token, cache.num_rows - 1);
  }
  bool converts_keys() const {
    return cache.key_scales || type != Form::TYPE || dim() % COLUMNS != 0;
  }
};

// What a panel has come to.
template <class Form, int VECTORS>
struct Panel {
  static constexpr int64_t LINES = Job<Form, VECTORS>::LINES;

  float *queries, *sums;  // [step, lane], [column, lane]
  float most[LINES], totals[LINES];
  int32_t limits[LINES];  // the last row that a lane sees
  int64_t least, last;    // of them

  static int64_t num_floats(const Job<Form, VECTORS>& job) {
    return (job.steps() + job.padded() + SPARE) * LINES;
  }
};

// A thread's memory: a chunk's keys, where they are converted, and values, and what one panel needs.
template <class Form, int VECTORS>
struct Scratch {
  static constexpr int64_t LINES = Job<Form, VECTORS>::LINES;

  float *keys, *values, *scores, *powers, *panels;

  static int64_t num_shared(const Job<Form, VECTORS>& job) {
    return CHUNK * divide_up(job.steps(), LANES) * LANES +
           job.padded() * Job<Form, VECTORS>::CHUNK_STEPS + (2 * CHUNK + SPARE) * LINES;
  }
  Scratch(const Job<Form, VECTORS>& job, float* floats)
      : keys(floats),
        values(keys + CHUNK * divide_up(job.steps(), LANES) * LANES),
        scores(values + job.padded() * Job<Form, VECTORS>::CHUNK_STEPS),
        powers(scores + (CHUNK + SPARE) * LINES),
        panels(powers + CHUNK * LINES) {}
};

// Columns of a row of keys or values in the form's type.
template <class Form, int VECTORS>
void convert(const Job<Form, VECTORS>& job, const void* cache, const float* scales, int64_t row,
             int64_t column, int64_t count, void* to) {
  const int64_t place = row * job.dim() + column;
  if (!scales) return to_type<Form::TYPE>(cache, job.type, place, count, to);
  const int8_t* own = static_cast<const int8_t*>(cache) + place;
  for (int64_t i = 0; i < count; i++) put(to, Form::TYPE, i, float(own[i]) * scales[row]);
}

// A chunk's values turned around, [column, step]; its first row is `first`.
template <class Form, int VECTORS>
void turn_values(const Job<Form, VECTORS>& job, int64_t first, int64_t count, float* to) {
  constexpr int64_t COLUMNS = Form::COLUMNS, STEPS = Job<Form, VECTORS>::CHUNK_STEPS;
  const auto rows_of = [&](int64_t row, int64_t column, void* own) {
    const int64_t columns = std::min(LANES, job.dim() - column);
    if (row < count)
      convert(job, job.cache.values, job.cache.value_scales, first + row, column, columns, own);
  };
  for (int64_t step = 0; step * COLUMNS < count; step += LANES)
    for (int64_t column = 0; column < job.padded(); column += LANES) {
      float lines[LANES][LANES] = {};
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t row = (step + i) * COLUMNS;
        if constexpr (COLUMNS == 1) {
          rows_of(row, column, lines[i]);
        } else {
          uint16_t two[2][LANES] = {};
          for (int64_t k = 0; k < 2; k++) rows_of(row + k, column, two[k]);
          for (int64_t k = 0; k < LANES; k++)
            lines[i][k] = from_bits(two[0][k] | uint32_t(two[1][k]) << 16);
        }
      }
      transpose(lines[0], LANES, to + column * STEPS + step, STEPS);
    }
}

// A panel's queries, [step, lane].
template <class Form, int VECTORS>
void turn_queries(const Job<Form, VECTORS>& job, int64_t row, int64_t head, int64_t panel,
                  float* to) {
  constexpr int64_t LINES = Job<Form, VECTORS>::LINES, COLUMNS = Form::COLUMNS;
  const Queries& given = job.queries;
  for (int64_t first = 0; first < LINES; first += LANES)
    for (int64_t step = 0; step < job.steps(); step += LANES) {
      float lines[LANES][LANES] = {};
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t query = panel * LINES + first + i;
        if (query >= job.num_queries()) break;
        const int64_t place = row * given.row_stride +
                              (head * job.group() + query / given.num_tokens) * given.head_stride +
                              query % given.num_tokens * given.token_stride;
        const int64_t column = step * COLUMNS, count = std::min(LANES * COLUMNS, job.dim() - column);
        to_type<Form::TYPE>(given.values, job.type, place + column, count, lines[i]);
      }
      turn(lines[0], job.steps() - step, to + step * LINES + first, LINES);
    }
}

// Scores become powers of them less the largest so far, which `most` is and `shrink` follows from.
template <class Form, int LINES>
void raise(float* scores, int64_t first, int64_t count, float scale, const int32_t* limits,
           bool sees_all, float* most, float* shrink, float* totals, float* powers) {
  float largest[LINES];
  std::copy(most, most + LINES, largest);
  for (int64_t r = 0; r < count; r++) {
    float* own = scores + r * LINES;
    for (int i = 0; i < LINES; i++) own[i] *= scale;
    const int32_t row = int32_t(first + r);
    if (!sees_all)
      for (int i = 0; i < LINES; i++) own[i] = limits[i] < row ? LOWEST : own[i];
    for (int i = 0; i < LINES; i++) largest[i] = largest[i] < own[i] ? own[i] : largest[i];
  }
  for (int i = 0; i < LINES; i++) {
    shrink[i] = exp_of(most[i] - largest[i]);
    totals[i] *= shrink[i];
    most[i] = largest[i];
  }
  if (count % Form::COLUMNS) std::fill_n(scores + count * LINES, LINES, LOWEST);
  for (int64_t r = 0; r < count; r += Form::COLUMNS) {
    float *own = scores + r * LINES, *words = powers + r / Form::COLUMNS * LINES;
    for (int i = 0; i < LINES; i++) {
      const float power = exp_of(own[i] - largest[i]);
      if constexpr (Form::COLUMNS == 1) {
        words[i] = power;
        totals[i] += power;
      } else {
        const float next = exp_of(own[LINES + i] - largest[i]);
        words[i] = pair_of(power, next);
        totals[i] += power + next;
      }
    }
  }
}

template <class Form, int VECTORS>
Panel<Form, VECTORS> begin_panel(const Job<Form, VECTORS>& job, int64_t row, int64_t head,
                                 int64_t index, float* floats) {
  constexpr int64_t LINES = Job<Form, VECTORS>::LINES;
  Panel<Form, VECTORS> panel{floats, floats + job.steps() * LINES, {}, {}, {}, job.cache.num_rows, 0};
  turn_queries(job, row, head, index, panel.queries);
  for (int64_t i = 0; i < LINES; i++) {
    const int64_t limit = job.limit(row, index * LINES + i);
    panel.limits[i] = int32_t(limit);
    panel.least = std::min(panel.least, limit);
    panel.last = std::max(panel.last, limit);
    panel.most[i] = LOWEST;
  }
  return panel;
}

// The rows of a chunk, `first` on, of which there are `count`.
template <class Form, int VECTORS>
void add_chunk(const Job<Form, VECTORS>& job, Panel<Form, VECTORS>& panel, int64_t first,
               int64_t count, const float* keys, const Scratch<Form, VECTORS>& scratch) {
  constexpr int64_t LINES = Job<Form, VECTORS>::LINES, STEPS = Job<Form, VECTORS>::CHUNK_STEPS;
  constexpr int ROWS = TILE_ROWS<VECTORS>;
  const int64_t steps = job.steps(), dim = job.dim();
  count = std::min(count, panel.last + 1 - first);
  const float* rows[ROWS];
  for (int64_t r = 0; r < count; r += ROWS) {
    for (int i = 0; i < ROWS; i++) rows[i] = keys + std::min(r + i, count - 1) * steps;
    multiply_tile<Form, VECTORS>(panel.queries, steps, rows, scratch.scores + r * LINES, LINES, true,
                                 Ahead::none(steps));
  }
  float shrink[LINES];
  raise<Form, int(LINES)>(scratch.scores, first, count, job.scale, panel.limits,
                          first + count - 1 <= panel.least, panel.most, shrink, panel.totals,
                          scratch.powers);
  if (first > 0)
    for (int64_t c = 0; c < dim; c++)
      for (int64_t i = 0; i < LINES; i++) panel.sums[c * LINES + i] *= shrink[i];
  const int64_t count_steps = divide_up(count, Form::COLUMNS);
  for (int64_t c = 0; c < dim; c += ROWS) {
    for (int i = 0; i < ROWS; i++) rows[i] = scratch.values + std::min(c + i, dim - 1) * STEPS;
    multiply_tile<Form, VECTORS>(scratch.powers, count_steps, rows, panel.sums + c * LINES, LINES,
                                 first == 0, Ahead::none(count_steps));
  }
}

template <class Form, int VECTORS>
void end_panel(const Job<Form, VECTORS>& job, int64_t row, int64_t head, int64_t index,
               const Panel<Form, VECTORS>& panel) {
  constexpr int64_t LINES = Job<Form, VECTORS>::LINES;
  const int64_t dim = job.dim(), tokens = job.queries.num_tokens;
  for (int64_t lane = 0; lane < LINES; lane += LANES)
    for (int64_t c = 0; c < dim; c += LANES) {
      float turned[LANES][LANES];
      transpose(panel.sums + c * LINES + lane, LINES, turned[0], LANES);
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t query = index * LINES + lane + i;
        if (query >= job.num_queries()) break;
        for (float& sum : turned[i]) sum /= panel.totals[lane + i];
        const int64_t token = row * tokens + query % tokens;
        const int64_t of = token * job.queries.num_heads + head * job.group() + query / tokens;
        from_floats(turned[i], job.type, of * dim + c, std::min(LANES, dim - c), job.out);
      }
    }
}

// The panels `begin` to `end` of a row and key head.
template <class Form, int VECTORS>
void attend_panels(const Job<Form, VECTORS>& job, int64_t row, int64_t head, int64_t begin,
                   int64_t end, const Scratch<Form, VECTORS>& scratch) {
  const int64_t steps = job.steps(), live = job.live(row);
  const int64_t first_row = (job.slots[row] * job.cache.num_heads + head) * job.cache.num_rows;
  std::vector<Panel<Form, VECTORS>> panels;
  for (int64_t i = begin; i < end; i++) {
    float* own = scratch.panels + (i - begin) * Panel<Form, VECTORS>::num_floats(job);
    panels.push_back(begin_panel(job, row, head, i, own));
  }
  for (int64_t first = 0; first < live; first += CHUNK) {
    const int64_t count = std::min(CHUNK, live - first);
    const float* keys = scratch.keys;
    if (job.converts_keys()) {
      for (int64_t i = 0; i < count; i++) {
        float* words = scratch.keys + i * steps;
        words[steps - 1] = 0;
        convert(job, job.cache.keys, job.cache.key_scales, first_row + first + i, 0, job.dim(), words);
      }
    } else {
      keys = static_cast<const float*>(job.cache.keys) + (first_row + first) * steps;
    }
    turn_values(job, first_row + first, count, scratch.values);
    for (Panel<Form, VECTORS>& panel : panels)
      if (first <= panel.last) add_chunk(job, panel, first, count, keys, scratch);
  }
  for (int64_t i = begin; i < end; i++) end_panel(job, row, head, i, panels[size_t(i - begin)]);
}

template <class Form, int VECTORS>
bool attend(const Job<Form, VECTORS>& job, int64_t num_threads) {
  const int64_t num_pairs = job.queries.num_rows * job.cache.num_heads, all = job.num_panels();
  // Panels of one pair are shared between threads only if there are few pairs.
  const int64_t parts = std::min(divide_up(3 * num_threads, num_pairs), all);
  const int64_t each = Scratch<Form, VECTORS>::num_shared(job) +
                       divide_up(all, parts) * Panel<Form, VECTORS>::num_floats(job);
  const size_t bytes = size_t(num_threads * each) * 4;
  float* floats = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!floats) return false;
#pragma omp parallel for schedule(dynamic) num_threads(int(num_threads))
  for (int64_t task = 0; task < num_pairs * parts; task++) {
    const Scratch<Form, VECTORS> scratch(job, floats + thread_index() * each);
    const int64_t pair = task / parts, part = task % parts;
    attend_panels(job, pair / job.cache.num_heads, pair % job.cache.num_heads, all * part / parts,
                  all * (part + 1) / parts, scratch);
  }
  std::free(floats);
  return true;
}

template <class Form, int VECTORS = MAX_VECTORS, class... Rest>
bool attend_with(int64_t vectors, int64_t num_threads, const Rest&... rest) {
  if constexpr (VECTORS > 1)
    if (vectors < VECTORS) return attend_with<Form, VECTORS - 1>(vectors, num_threads, rest...);
  return attend(Job<Form, VECTORS>{{rest...}}, num_threads);
}

}  // namespace

extern "C" int attend_many(const Queries* queries, const Cache* cache, const int64_t* positions,
                           const int64_t* slots, double scale, int64_t type, void* out,
                           int64_t num_threads) {
  const int64_t all = queries->num_heads / cache->num_heads * queries->num_tokens;
  const int64_t vectors = divide_up(all, LANES);
  const auto call = [&](auto form) {
    return attend_with<decltype(form)>(vectors, num_threads, *queries, *cache, positions, slots,
                                       float(scale), type, out);
  };
#ifdef LLAMAC_BRAINS
  if (type == BFLOAT16) return call(BrainForm());
#endif
  return call(FloatForm());
}
