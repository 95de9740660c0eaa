// Products of a few rows with packed weights; packed_product.py says what a packed weight is.
//
// A row of a weight is read in blocks of a vector's bytes. Of every 32-bit lane the fields (8 of 4
// bits, or 4 of 8) become numbers without a shift: masked in place, field s is 2^(bits s) too
// large, which x makes up for. So x is arranged once: for each block the first columns of all
// lanes, then the second ones. A lane's columns share a scale, so that a block is one product of
// vectors and scales.

// GCC's choice of induction variables spills the pointers of the loop over blocks.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-ivopts")
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <type_traits>

#include "packed_form.h"
#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t LINE = 16;  // floats of a line of the cache
constexpr int ROWS_AT_ONCE = LANES == 16 ? 2 : 1;  // rows of a weight that there are registers for
// Rows of a weight that a part of x stays in the first cache for, and that part.
constexpr int64_t STRIP = 8, CHUNK_BYTES = 16384;
// Where x is one row, that many distant rows are read at once, each straight through its own run of
// rows: what is loaded of x serves all, and few runs are easily fetched ahead.
constexpr int64_t RUNS = 4, FETCHED_AHEAD = 512;
constexpr int64_t SCALES_READ = 8;  // at once, as they lie
constexpr int IN_SCRATCH = -1;      // in place of their type, where they aren't

// x as a form reads it: [block, row of x] of the form's vectors, padded with zeros; and the sums of
// its lanes, [row of x, block, lane].
template <class Form>
struct Arranged {
  static constexpr int64_t COLUMNS = LANES * Form::COLUMNS;  // of a block
  static constexpr int64_t FLOATS = LANES * Form::VECTORS;

  static int64_t num_blocks(const X& x) { return divide_up(x.width, COLUMNS); }
  static int64_t num_floats(const X& x) { return num_blocks(x) * x.num_rows * FLOATS; }
  static int64_t num_sums(const X& x) { return num_blocks(x) * x.num_rows * LANES; }

  static void fill(const X& x, float* vectors, int num_threads) {
    float* sums = vectors + num_floats(x);
#pragma omp parallel for num_threads(num_threads) if (x.num_rows > 1)
    for (int64_t place = 0; place < num_blocks(x) * x.num_rows; place++) {
      const int64_t block = place / x.num_rows, row = place % x.num_rows, first = block * COLUMNS;
      float columns[COLUMNS] = {};
      to_floats(x.values, x.type, row * x.width + first, std::min(COLUMNS, x.width - first),
                columns);
      Form::arrange(columns, vectors + place * FLOATS,
                    sums + (row * num_blocks(x) + block) * LANES);
    }
  }
};

// How far a column's index is shifted to that of its group.
int group_shift(const PackedWeight& weight) {
  for (int shift = 4; shift < 63; shift++)
    if (weight.group == int64_t(1) << shift) return shift;
  return 63;  // one group, of any width
}

int64_t num_groups(const PackedWeight& weight, const X& x) { return x.width / weight.group; }

// Of each row of x and group of the weight the columns' sum, padded with zeros to vectors.
template <class Form>
void fill_group_sums(const PackedWeight& weight, const X& x, const float* vectors, float* sums) {
  const int64_t groups = num_groups(weight, x), padded = divide_up(groups, LINE) * LINE;
  const int64_t lanes = weight.group / Form::COLUMNS;  // of a group
  const float* lane_sums = vectors + Arranged<Form>::num_floats(x);
  for (int64_t row = 0; row < x.num_rows; row++, sums += padded) {
    const float* own = lane_sums + row * Arranged<Form>::num_blocks(x) * LANES;
    std::fill(sums + groups, sums + padded, 0.f);
    for (int64_t group = 0; group < groups; group++)
      sums[group] = std::accumulate(own + group * lanes, own + (group + 1) * lanes, 0.f);
  }
}

// A thread's scratch: the sums of a strip of rows, their scales and offsets.
struct Scratch {
  float *sums, *scales, *offsets;

  static int64_t num_sums(const X& x) { return STRIP * x.num_rows * LANES; }
  // Of the smallest groups, and a vector behind them.
  static int64_t num_scales(const X& x) {
    return (divide_up(STRIP * (x.width / 16 + 1), LINE) + 1) * LINE;
  }
  static int64_t num_floats(const X& x) { return num_sums(x) + 2 * num_scales(x); }

  Scratch(const X& x, float* floats)
      : sums(floats), scales(sums + num_sums(x)), offsets(scales + num_scales(x)) {}
};

// What a thread multiplies. SCALES is the type of the scales that are read, or IN_SCRATCH.
template <class Form, int SCALES>
struct Job {
  const PackedWeight& weight;
  const X& x;
  const float* vectors;     // Arranged
  const float* group_sums;  // of x
  Scratch scratch;
  const void** scales;  // of the strip's rows
  Words lane_groups;    // see lane_groups_of
  int shift;
  bool has_zero_point;  // see Form
  Words table;          // the form's
  const float* starts;  // what the form's `multiply` is given besides, of the first block and row of x
  int64_t start_step;

  bool has_offsets() const { return weight.minimum || !has_zero_point; }
};

// The scales of a block's lanes, of a row's from a group on.
template <int SCALES>
Floats lane_scales(const void* row, int64_t group, Words lane_groups) {
#ifdef LLAMAC_AVX512
  const uint16_t* halves = static_cast<const uint16_t*>(row) + group;
  if constexpr (SCALES == BFLOAT16) return take_brains(halves, lane_groups);
  if constexpr (SCALES == FLOAT16) return take_halves(halves, lane_groups);
#endif
  return take(static_cast<const float*>(row) + group, lane_groups);
}

// What finds the lanes' scales among those of a block's groups.
template <class Form, int SCALES>
Words lane_groups_of(int shift) {
  alignas(64) uint8_t bytes[4 * LANES] = {};
  for (int64_t lane = 0; lane < LANES; lane++) {
    const uint32_t group = uint32_t(lane * Form::COLUMNS >> shift);
    const uint32_t two = (2 * group + 1) << 8 | 2 * group;  // its bytes of 16 bits
    const uint32_t word = SCALES == BFLOAT16 ? two << 16 | 0x8080 : SCALES == FLOAT16 ? two : group;
    const int64_t size = SCALES == FLOAT16 ? 2 : 4;
    std::memcpy(bytes + size * lane, &word, size_t(size));
  }
  return load_words(bytes);
}

// Rows of a weight: `count` from `first` on, `step` apart.
struct Rows {
  int64_t first, count, step;
};

// Adds the products of NUM_X rows of x, first_x on, with ROWS of the rows, `place` on, in the blocks
// first to last. IS_ONE says that x has no other row, and these are all blocks: results are written.
template <int ROWS, int NUM_X, bool IS_ONE, class Form, int SCALES>
void multiply_blocks(const Job<Form, SCALES>& job, const Rows& rows, int64_t place, int64_t first_x,
                     int64_t first, int64_t last) {
  constexpr int64_t COLUMNS = Arranged<Form>::COLUMNS, FLOATS = Arranged<Form>::FLOATS;
  const PackedWeight& weight = job.weight;
  const int64_t all_x = IS_ONE ? 1 : job.x.num_rows;
  const int64_t row_bytes = job.x.width * weight.bits / 8;
  const int64_t stride = rows.step * row_bytes;
  const uint8_t* bytes = weight.packed + rows.first * row_bytes + place * stride;
  const uint8_t* limit = weight.packed + weight.num_rows * row_bytes;
  float* row_sums = job.scratch.sums + (place * all_x + first_x) * LANES;

  const int64_t start_step = job.start_step;
  const float *all_vectors = job.vectors + first_x * FLOATS,
              *starts = job.starts + first_x * start_step;
  const Words lane_groups = job.lane_groups, table = job.table;
  const int shift = job.shift;

  const bool has_sums = !IS_ONE || job.has_offsets();
  const void* scales[ROWS];
  Floats sums[ROWS][NUM_X];
  for (int r = 0; r < ROWS; r++) {
    scales[r] = job.scales[place + r];
    for (int m = 0; m < NUM_X; m++)
      sums[r][m] = has_sums ? load(row_sums + (r * all_x + m) * LANES) : zeros();
  }

  const auto add_block = [&](const Words* words, int64_t block,
                             auto is_whole) __attribute__((always_inline)) {
    typename Form::Factors factors[ROWS];
    Floats scale[ROWS];
    const int64_t group = block * COLUMNS >> shift;
    for (int r = 0; r < ROWS; r++) {
      factors[r] = Form::factors(words[r], table);
      scale[r] = lane_scales<SCALES>(scales[r], group, lane_groups);
#ifdef LLAMAC_AVX512
      // Where x is zero, the next row's scales could be no numbers.
      if constexpr (SCALES != IN_SCRATCH && !is_whole)
        scale[r] = first_lanes(scale[r], (job.x.width - block * COLUMNS) / Form::COLUMNS);
#endif
    }
    const float* vectors = all_vectors + block * all_x * FLOATS;
    const float* start = starts + block * all_x * start_step;
#pragma GCC unroll 8
    for (int m = 0; m < NUM_X; m++, vectors += FLOATS, start += start_step)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
        sums[r][m] = multiply_add(Form::multiply(factors[r], vectors, start),
                                  scale[r], sums[r][m]);
  };
  const int64_t num_whole =
      std::min((limit - bytes - (ROWS - 1) * stride) / BLOCK_BYTES, job.x.width / COLUMNS);
  for (int64_t block = first; block < std::min(last, num_whole); block++) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const uint8_t* own = bytes + r * stride + block * BLOCK_BYTES;
      // Into the first cache, or the second. Of 8 bits, whose blocks pass faster, the first one's
      // lines would replace x's; measured.
      if constexpr (IS_ONE) __builtin_prefetch(own + FETCHED_AHEAD, 0, 3);
      else if constexpr (Form::COLUMNS == 8) __builtin_prefetch(own + 2048, 0, 3);
      else __builtin_prefetch(own + 4096, 0, 2);
      words[r] = load_words(own);
    }
    add_block(words, block, std::true_type());
  }
  for (int64_t block = std::max(first, num_whole); block < last; block++) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const uint8_t* own = bytes + r * stride + block * BLOCK_BYTES;
      uint8_t rest[BLOCK_BYTES] = {};
      const bool is_inside = own + BLOCK_BYTES <= limit;
      if (!is_inside) std::memcpy(rest, own, size_t(limit - own));
      words[r] = load_words(is_inside ? own : rest);
    }
    add_block(words, block, std::false_type());
  }
  if constexpr (IS_ONE) {
    float results[ROWS];
    sum_each<ROWS>(&sums[0][0], results);
    for (int r = 0; r < ROWS; r++)
      put(weight.out, job.x.type, rows.first + (place + r) * rows.step, results[r]);
  } else {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < NUM_X; m++) store(row_sums + (r * all_x + m) * LANES, sums[r][m]);
  }
}

// Finds the rows' scales, and begins their sums with what the zero point or the minima add; one row
// of x has no sums where these add nothing.
template <class Form, int SCALES>
void begin(const Job<Form, SCALES>& job, const Rows& rows) {
  const PackedWeight& weight = job.weight;
  const Scratch& scratch = job.scratch;
  const int64_t groups = num_groups(weight, job.x), padded = divide_up(groups, LINE) * LINE;
  const Floats zero_point = spread(-float(1 << (weight.bits - 1)));
  const bool has_offsets = job.has_offsets();
  for (int64_t row = 0; row < rows.count; row++) {
    const int64_t first = (rows.first + row * rows.step) * groups, place = row * groups;
    const auto scales_at = [&](int64_t i) {
      return load_as(weight.scale, weight.scale_type, first + i, groups - i);
    };
    const auto offsets_at = [&](int64_t i) {
      return weight.minimum ? load_as(weight.minimum, weight.minimum_type, first + i, groups - i)
                            : multiply_add(zero_point, scales_at(i), zeros());
    };
    job.scales[row] = scratch.scales + place;
    if constexpr (SCALES == IN_SCRATCH) {
      for (int64_t i = 0; i < groups; i += LANES) store(scratch.scales + place + i, scales_at(i));
    } else {
      const int64_t size = SCALES == FLOAT32 ? 4 : 2;
      const char* own = static_cast<const char*>(weight.scale) + first * size;
      if (first + groups + SCALES_READ <= weight.num_rows * groups) job.scales[row] = own;
      else std::memcpy(scratch.scales + place, own, size_t(groups * size));
    }
    const bool is_one = job.x.num_rows == 1;
    if (is_one && !has_offsets) continue;
    for (int64_t i = 0; has_offsets && !is_one && i < groups; i += LANES)
      store(scratch.offsets + place + i, offsets_at(i));
    for (int64_t m = 0; m < job.x.num_rows; m++) {
      Floats sums = zeros();
      for (int64_t i = 0; has_offsets && i < groups; i += LANES)
        sums = multiply_add(is_one ? offsets_at(i) : load(scratch.offsets + place + i),
                            load(job.group_sums + m * padded + i), sums);
      store(scratch.sums + (row * job.x.num_rows + m) * LANES, sums);
    }
  }
  // Read for columns behind x's last, for which x has zeros.
  if constexpr (SCALES == IN_SCRATCH)
    for (int64_t i = 0; i < LINE; i += LANES)
      store(scratch.scales + rows.count * groups + i, zeros());
}

// Writes the rows' results.
template <class Form, int SCALES>
void end(const Job<Form, SCALES>& job, const Rows& rows) {
  for (int64_t row = 0; row < rows.count; row++)
    for (int64_t m = 0; m < job.x.num_rows; m++)
      put(job.weight.out, job.x.type,
          m * job.weight.num_rows + rows.first + row * rows.step,
          sum(load(job.scratch.sums + (row * job.x.num_rows + m) * LANES)));
}

// The rows first to last of a weight, and those `step` behind each if it is above 0, with one row of
// x.
template <int COUNT, class Form, int SCALES>
void multiply_one(const Job<Form, SCALES>& job, int64_t first, int64_t last, int64_t step) {
  if constexpr (COUNT > 1)
    if (step == 0) return multiply_one<1>(job, first, last, 0);
  for (int64_t row = first; row < last; row++) {
    const Rows rows{row, COUNT, step};
    begin(job, rows);
    multiply_blocks<COUNT, 1, true>(job, rows, 0, 0, 0, Arranged<Form>::num_blocks(job.x));
  }
}

// The same with all rows of x from first_x on, as many at once as there are registers for.
template <int ROWS, int NUM_X = 8, class Form, int SCALES>
void multiply_all_x(const Job<Form, SCALES>& job, const Rows& rows, int64_t place, int64_t first_x,
                    int64_t first, int64_t last) {
  for (; first_x + NUM_X <= job.x.num_rows; first_x += NUM_X)
    multiply_blocks<ROWS, NUM_X, false>(job, rows, place, first_x, first, last);
  if constexpr (NUM_X > 1)
    multiply_all_x<ROWS, NUM_X / 2>(job, rows, place, first_x, first, last);
}

// The rows first to last with several rows of x, a part of its columns at a time.
template <class Form, int SCALES>
void multiply_several(const Job<Form, SCALES>& job, int64_t first, int64_t last) {
  const X& x = job.x;
  const int64_t num_blocks = Arranged<Form>::num_blocks(x);
  const int64_t in_cache = CHUNK_BYTES / (4 * Arranged<Form>::FLOATS * x.num_rows);
  const int64_t chunk = std::max<int64_t>(1, in_cache);
  for (int64_t strip = first; strip < last; strip += STRIP) {
    const Rows rows{strip, std::min(STRIP, last - strip), 1};
    begin(job, rows);
    for (int64_t block = 0; block < num_blocks; block += chunk) {
      const int64_t stop = std::min(num_blocks, block + chunk);
      int64_t row = 0;
      for (; row + ROWS_AT_ONCE <= rows.count; row += ROWS_AT_ONCE)
        multiply_all_x<ROWS_AT_ONCE>(job, rows, row, 0, block, stop);
      for (; row < rows.count; row++) multiply_all_x<1, 1>(job, rows, row, 0, block, stop);
    }
    end(job, rows);
  }
}

// Calls the generic function with the form of this x and these bits.
template <class Function>
void with_form(const X& x, int64_t bits, Function function) {
#ifdef LLAMAC_BYTES
  if (x.type == BFLOAT16 && bits == 8) return function(ByteForm());
#endif
#ifdef LLAMAC_BRAINS
  if (x.type == BFLOAT16 && bits == 4) return function(BrainForm());
#endif
  if (bits == 8) function(FloatForm<8>());
  else function(FloatForm<4>());
}

// The same with how a weight's scales are read.
template <class Function>
void with_scales(const X& x, const PackedWeight& weight, Function function) {
  with_form(x, weight.bits, [&](auto form) {
    const auto call = [&](auto scales) { function(form, scales); };
    if constexpr (!decltype(form)::READS_SCALES) call(std::integral_constant<int, IN_SCRATCH>());
    else if (weight.scale_type == BFLOAT16) call(std::integral_constant<int, BFLOAT16>());
    else if (weight.scale_type == FLOAT16) call(std::integral_constant<int, FLOAT16>());
    else call(std::integral_constant<int, FLOAT32>());
  });
}

}  // namespace

extern "C" int multiply_packed(const void* values, int64_t type, int64_t num_x, int64_t width,
                               const PackedWeight* weights, int64_t num_weights, int64_t num_threads) {
#ifdef LLAMAC_BRAINS
  // Of 8 bits the numbers as bfloat16 are multiplied faster from so many rows on; measured.
  const auto is_byte = [](const PackedWeight& weight) { return weight.bits == 8; };
  if (type == BFLOAT16 && num_x >= 12 && std::all_of(weights, weights + num_weights, is_byte))
    return multiply_many(values, type, num_x, width, weights, num_weights, num_threads);
#endif
  const X x{values, type, num_x, width};
  // Scratch: x arranged for 4 bits and for 8; for each weight x's group sums; the threads' own.
  int64_t arranged[2], size = 0;
  bool is_used[2] = {false, false};
  for (int64_t i = 0; i < num_weights; i++) is_used[weights[i].bits / 4 - 1] = true;
  for (int i = 0; i < 2; i++) {
    arranged[i] = size;
    if (is_used[i])
      with_form(x, 4 * (i + 1), [&](auto form) {
        using Own = Arranged<decltype(form)>;
        size += Own::num_floats(x) + Own::num_sums(x);
      });
  }
  const int64_t sums = size, sums_each = num_x * divide_up(divide_up(width, 16), LINE) * LINE;
  const int64_t own = sums + num_weights * sums_each;
  const size_t bytes = size_t(own + num_threads * Scratch::num_floats(x)) * 4;
  float* scratch = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!scratch) return 0;
  // One row is not worth the wait for other threads.
  for (int i = 0; i < 2; i++)
    if (is_used[i])
      with_form(x, 4 * (i + 1), [&](auto form) {
        Arranged<decltype(form)>::fill(x, scratch + arranged[i], int(num_threads));
      });
  for (int64_t i = 0; i < num_weights; i++)
    with_form(x, weights[i].bits, [&](auto form) {
      if (weights[i].minimum || !form.has_zero_point())
        fill_group_sums<decltype(form)>(weights[i], x, scratch + arranged[weights[i].bits / 4 - 1],
                                      scratch + sums + i * sums_each);
    });
  RowPieces pieces(weights, num_weights, width, num_threads, num_x > 1 ? 1 : RUNS, STRIP,
                   [](const PackedWeight& weight) { return weight.bits; });
#pragma omp parallel num_threads(int(num_threads))
  {
    const int64_t thread = thread_index();
    pieces.run([&](int64_t i, int64_t first, int64_t last, int64_t step) {
      with_scales(x, weights[i], [&](auto form, auto scales) {
        using Form = decltype(form);
        constexpr int SCALES = decltype(scales)::value;
        alignas(64) static constexpr float NOTHING[LANES] = {};
        const float* vectors = scratch + arranged[weights[i].bits / 4 - 1];
        const bool has_zero_point = form.has_zero_point() && !weights[i].minimum;
        const int shift = group_shift(weights[i]);
        const void* rows[STRIP];
        const Job<Form, SCALES> job{
            weights[i],
            x,
            vectors,
            scratch + sums + i * sums_each,
            Scratch(x, scratch + own + thread * Scratch::num_floats(x)),
            rows,
            lane_groups_of<Form, SCALES>(shift),
            shift,
            has_zero_point,
            Form::table(has_zero_point),
            has_zero_point ? vectors + Form::START * LANES : NOTHING,
            has_zero_point ? Arranged<Form>::FLOATS : 0};
        if (num_x > 1) return multiply_several(job, first, last);
        multiply_one<RUNS>(job, first, last, step);
      });
    });
  }
  std::free(scratch);
  return 1;
}
