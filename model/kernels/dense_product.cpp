// Products of a few rows with weights of 16 or 32 bits, at the speed of reading the weights.
//
// Several rows of a weight are multiplied at once, so that what is loaded of x serves all of them.
// They lie far apart, each the next of its own run of rows: a run is read straight through, and what
// is fetched ahead of a row is the row that follows in its run.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

// Bytes ahead that are fetched into the first cache: for one row of x at once, for several after they
// were into the second, else reading and multiplying take their times one after the other.
constexpr int64_t ONE_AHEAD = 1024, FAR_AHEAD = 4096, NEAR_AHEAD = 512;
// Rows of x that there are registers for beside one row of a weight or more, and those registers.
constexpr int MAX_M = LANES == 16 ? 8 : 4, REGISTERS = LANES == 16 ? 24 : 12;

// How a block of a row is read: `COLUMNS` of it as `VECTORS` factors, for as many vectors of x.
struct FloatRow {
  static constexpr int64_t COLUMNS = LANES, VECTORS = 1;
  using Factor = Floats;
  static void read(const void* block, Factor* factors) {
    factors[0] = load(static_cast<const float*>(block));
  }
  static Floats multiply(Factor factor, Floats x, Floats sums) {
    return multiply_add(factor, x, sums);
  }
  static void arrange(const float* columns, float* x) { store(x, load(columns)); }
};

struct HalfRow : FloatRow {
  static constexpr int64_t COLUMNS = 2 * LANES, VECTORS = 2;
  static void read(const void* block, Factor* factors) {
    for (int i = 0; i < 2; i++)
      factors[i] = load_halves(static_cast<const uint16_t*>(block) + i * LANES);
  }
  static void arrange(const float* columns, float* x) {
    for (int i = 0; i < 2; i++) store(x + i * LANES, load(columns + i * LANES));
  }
};

#ifdef LLAMAC_BRAINS
struct BrainRow {
  static constexpr int64_t COLUMNS = 2 * LANES, VECTORS = 1;
  using Factor = __m512bh;
  static void read(const void* block, Factor* factors) { factors[0] = (Factor)load_words(block); }
  static Floats multiply(Factor factor, Floats x, Floats sums) {
    return _mm512_dpbf16_ps(sums, factor, (__m512bh)x);
  }
  static void arrange(const float* columns, float* x) {
    uint16_t* brains = reinterpret_cast<uint16_t*>(x);
    for (int i = 0; i < COLUMNS; i++) brains[i] = uint16_t(to_bits(columns[i]) >> 16);
  }
};
#else
// The numbers of even columns, then those of odd ones: neither needs to be widened.
struct BrainRow : HalfRow {
  static void read(const void* block, Factor* factors) {
    const Words words = load_words(block);
    factors[0] = low_brains(words);
    factors[1] = high_brains(words);
  }
  static void arrange(const float* columns, float* x) {
    for (int i = 0; i < COLUMNS; i++) x[i % 2 * LANES + i / 2] = columns[i];
  }
};
#endif

struct Job {
  const X& x;
  const DenseWeight& weight;
  const float* vectors;  // of x: [M rows, block, row, VECTORS, LANES]
};

// Products of M rows of x, from first_x on, with ROWS rows of a weight, `step` apart.
template <class Row, int ROWS, int M>
void multiply_tile(const Job& job, int64_t first_x, int64_t row, int64_t step) {
  const int64_t row_bytes = job.x.width * (job.x.type == FLOAT32 ? 4 : 2);
  const int64_t num_whole = job.x.width / Row::COLUMNS;
  const char* rows[ROWS];
  for (int r = 0; r < ROWS; r++)
    rows[r] = static_cast<const char*>(job.weight.values) + (row + r * step) * row_bytes;
  Floats sums[ROWS][M];
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < M; m++) sums[r][m] = zeros();
  const float* vectors =
      job.vectors + first_x * divide_up(job.x.width, Row::COLUMNS) * Row::VECTORS * LANES;
  const auto add_block = [&](const auto& blocks) __attribute__((always_inline)) {
    typename Row::Factor factors[ROWS][Row::VECTORS];
    for (int r = 0; r < ROWS; r++) Row::read(blocks[r], factors[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int i = 0; i < Row::VECTORS; i++, vectors += LANES) {
        const Floats vector = load(vectors);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
          sums[r][m] = Row::multiply(factors[r][i], vector, sums[r][m]);
      }
  };
  for (int64_t block = 0; block < num_whole; block++) {
    for (int r = 0; r < ROWS; r++) {
      if constexpr (M > 1) __builtin_prefetch(rows[r] + FAR_AHEAD, 0, 2);
      __builtin_prefetch(rows[r] + (M > 1 ? NEAR_AHEAD : ONE_AHEAD), 0, 3);
    }
    add_block(rows);
    for (int r = 0; r < ROWS; r++) rows[r] += BLOCK_BYTES;
  }
  if (const int64_t rest = row_bytes - num_whole * BLOCK_BYTES) {
    alignas(64) char blocks[ROWS][BLOCK_BYTES] = {};
    for (int r = 0; r < ROWS; r++) std::memcpy(blocks[r], rows[r], size_t(rest));
    add_block(blocks);
  }
  const int64_t count = std::min<int64_t>(M, job.x.num_rows - first_x);
  for (int r = 0; r < ROWS; r++)
    for (int64_t m = 0; m < count; m++)
      put(job.weight.out, job.x.type, (first_x + m) * job.weight.num_rows + row + r * step,
          sum(sums[r][m]));
}

// Rows of a weight that are multiplied at once: those that there are registers for, as each loads all
// of x; but two are read faster, where x stays in the first cache beside them.
template <int M>
constexpr int MOST_ROWS = std::min(4, REGISTERS / M);

template <class Row>
bool stays_near(const X& x) {
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL1_DCACHE_SIZE), 32768);
  const int64_t bytes = x.num_rows * x.width * Row::VECTORS * BLOCK_BYTES / Row::COLUMNS;
  return x.num_rows > 1 && bytes <= cache * 2 / 3;
}

// The rows first to last of a weight, and those `step` behind each if it is above 0; those of a tile
// stay in the cache for all rows of x.
template <class Row, int M, int ROWS>
void multiply_rows(const Job& job, int64_t first, int64_t last, int64_t step) {
  for (int64_t row = first; row < last; row++)
    for (int64_t x = 0; x < job.x.num_rows; x += M) {
      if (step > 0) multiply_tile<Row, ROWS, M>(job, x, row, step);
      else multiply_tile<Row, 1, M>(job, x, row, 0);
    }
}

// One block of one row of x.
template <class Row, int M>
void arrange(const X& x, float* vectors, int64_t place) {
  const int64_t num_blocks = divide_up(x.width, Row::COLUMNS);
  const int64_t row = place / (M * num_blocks) * M + place % M;
  const int64_t column = place / M % num_blocks * Row::COLUMNS;
  float columns[Row::COLUMNS] = {};
  if (row < x.num_rows)
    to_floats(x.values, x.type, row * x.width + column, std::min(Row::COLUMNS, x.width - column),
              columns);
  Row::arrange(columns, vectors + place * Row::VECTORS * LANES);
}

template <class Row, int M, int ROWS>
bool multiply(const X& x, const DenseWeight* weights, int64_t num_weights, int64_t num_threads) {
  const int64_t num_places = divide_up(x.num_rows, M) * M * divide_up(x.width, Row::COLUMNS);
  const size_t bytes = size_t(num_places * Row::VECTORS * LANES) * 4;
  float* vectors = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!vectors) return false;
  RowPieces pieces(weights, num_weights, x.width, num_threads, ROWS, 1,
                   [&](const DenseWeight&) { return x.type == FLOAT32 ? 32 : 16; });
#pragma omp parallel num_threads(int(num_threads))
  {
#pragma omp for
    for (int64_t place = 0; place < num_places; place++) arrange<Row, M>(x, vectors, place);
    pieces.run([&](int64_t i, int64_t first, int64_t last, int64_t step) {
      multiply_rows<Row, M, ROWS>({x, weights[i], vectors}, first, last, step);
    });
  }
  std::free(vectors);
  return true;
}

// Calls the generic function with the constant M, which is at most MAX_M.
template <int M = MAX_M, class Function>
bool with_count(int64_t count, Function function) {
  if constexpr (M > 1)
    if (count < M) return with_count<M - 1>(count, function);
  return function(std::integral_constant<int, M>());
}

}  // namespace

extern "C" int multiply_dense(const void* values, int64_t type, int64_t num_x, int64_t width,
                              const DenseWeight* weights, int64_t num_weights,
                              int64_t num_threads) {
  const X x{values, type, num_x, width};
  // As many passes as needed, all of as many rows.
  const int64_t at_once = divide_up(num_x, divide_up(num_x, MAX_M));
  return with_count(at_once, [&](auto count) {
    constexpr int M = decltype(count)::value;
    const auto call = [&](auto row) {
      using Row = decltype(row);
      const auto run = stays_near<Row>(x) ? multiply<Row, M, std::min(2, MOST_ROWS<M>)>
                                          : multiply<Row, M, MOST_ROWS<M>>;
      return run(x, weights, num_weights, num_threads);
    };
    return type == FLOAT32    ? call(FloatRow())
           : type == BFLOAT16 ? call(BrainRow())
                              : call(HalfRow());
  });
}
