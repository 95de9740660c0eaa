// Products of a few rows with packed weights, and their unpacking; packed_product.py says what a
// packed weight is.
//
// A row of a weight is read in blocks of a vector's bytes. Of every 32-bit lane the fields (8 of 4
// bits, or 4 of 8) become numbers without a shift: masked in place, field s is 2^(bits s) too
// large, which x makes up for. So x is arranged once: for each block the first columns of all
// lanes, then the second ones. A lane's columns share a scale, so that a block is one product of
// vectors and scales.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LLAMAC_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define LLAMAC_AVX2
#endif
#if defined(LLAMAC_AVX512) || defined(LLAMAC_AVX2) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// ---- numbers of 16 bits

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float from_bfloat16(uint16_t value) { return from_bits(uint32_t(value) << 16); }

uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value), odd = bits >> 16 & 1;
  const uint16_t nan = bits >> 16 | 64;
  return value == value ? uint16_t((bits + 0x7FFF + odd) >> 16) : nan;
}

float from_float16(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000) << 16, rest = uint32_t(value & 0x7FFF) << 13;
  if (rest >= 0x0F800000) return from_bits(sign | rest | 0x7F800000);  // infinite, or no number
  return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));
}

uint16_t to_float16(float value) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000, rest = to_bits(value) & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;
  // Below 2^-14 the spacing is 2^-24: adding a half rounds to it.
  if (rest < 0x38800000) return sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f));
  return sign | ((rest - 0x38000000 + 0x0FFF + (rest >> 13 & 1)) >> 13);
}

// ---- vectors: a block's bytes as 32-bit lanes, and as many floats

#if defined(LLAMAC_AVX512)

constexpr int64_t LANES = 16;
using Floats = __m512;
using Words = __m512i;

inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats take(const float* from, Words lanes) {
  return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(from));
}
inline Floats masked(Words words, uint32_t mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, unsigned(shift)));
}
inline float sum(Floats value) { return _mm512_reduce_add_ps(value); }

#elif defined(LLAMAC_AVX2)

constexpr int64_t LANES = 8;
using Floats = __m256;
using Words = __m256i;

inline Words load_words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats take(const float* from, Words lanes) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), lanes);
}
inline Floats masked(Words words, uint32_t mask) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(mask))));
}
inline Floats shifted(Words words, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, shift));
}
inline float sum(Floats value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#else

constexpr int64_t LANES = 8;
struct Floats { float lane[LANES]; };
struct Words { uint32_t lane[LANES]; };

template <class Result, class Function>
inline Result each(Function function) {
  Result result;
  for (int i = 0; i < LANES; i++) result.lane[i] = function(i);
  return result;
}
inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}
inline Floats load(const float* from) {
  return each<Floats>([&](int i) { return from[i]; });
}
inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats zeros() { return Floats{}; }
inline Floats add(Floats a, Floats b) {
  return each<Floats>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Floats take(const float* from, Words lanes) {
  return each<Floats>([&](int i) { return from[lanes.lane[i]]; });
}
inline Floats masked(Words words, uint32_t mask) {
  return each<Floats>([&](int i) { return float(int32_t(words.lane[i] & mask)); });
}
inline Floats shifted(Words words, int shift) {
  return each<Floats>([&](int i) { return float(int32_t(words.lane[i] >> shift)); });
}
inline float sum(Floats value) {
  float total = 0;
  for (float lane : value.lane) total += lane;
  return total;
}

#endif

constexpr int64_t BLOCK_BYTES = 4 * LANES;
constexpr int64_t PREFETCH_BYTES = 4096;
constexpr int64_t LINE = 16;  // floats in a line of the cache

// ---- the job

// Of int64 alone, as packed_product.py fills it.
struct Weight {
  const uint8_t* packed;
  const void* scale;
  const void* minimum;  // or null
  void* out;
  int64_t num_rows, bits, group, scale_type, minimum_type;
};
static_assert(sizeof(Weight) == 9 * sizeof(int64_t), "a table of int64");

float zero_point(const Weight& weight) { return float(1 << (weight.bits - 1)); }

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Numbers as float32; `type` is loop-invariant, so that each loop is one of vectors.
void to_floats(const void* from, int64_t type, int64_t first, int64_t count, float* to) {
  if (type == FLOAT32) {
    std::memcpy(to, static_cast<const float*>(from) + first, size_t(count) * 4);
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(from) + first;
  int64_t i = 0;
  if (type == BFLOAT16) {
    for (; i < count; i++) to[i] = from_bfloat16(values[i]);
    return;
  }
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < count; i++) to[i] = from_float16(values[i]);
}

void put(void* out, int64_t type, int64_t index, float value) {
  if (type == FLOAT32) static_cast<float*>(out)[index] = value;
  else if (type == BFLOAT16) static_cast<uint16_t*>(out)[index] = to_bfloat16(value);
  else static_cast<uint16_t*>(out)[index] = to_float16(value);
}

// ---- the forms: how a block's fields and the arranged x become products

template <int BITS>
struct FloatForm {
  static constexpr int COLUMNS = 32 / BITS;  // of a lane
  static constexpr int VECTORS = COLUMNS;    // of a block's x
  using Factor = Floats;

  // The last field is shifted: masked in place it could be negative.
  static constexpr bool is_shifted(int field) { return field == COLUMNS - 1; }

  static Factor factor(Words words, int field) {
    if (is_shifted(field)) return shifted(words, 32 - BITS);
    return masked(words, ((1u << BITS) - 1) << (BITS * field));
  }
  static Floats multiply(Factor factor, const float* x, Floats sums) {
    return multiply_add(factor, load(x), sums);
  }
  static void arrange(const float* columns, float* x) {
    for (int field = 0; field < COLUMNS; field++) {
      const float power = is_shifted(field) ? 1.f : 1.f / float(1u << (BITS * field));
      for (int lane = 0; lane < LANES; lane++)
        x[field * LANES + lane] = columns[lane * COLUMNS + field] * power;
    }
  }
};

#if defined(LLAMAC_AVX512) && defined(__AVX512BF16__)
// For an x of bfloat16 and 4 bits: a table makes both of bfloat16, which is exact.
struct BrainForm {
  static constexpr int COLUMNS = 8;
  static constexpr int VECTORS = 4;
  using Factor = __m512bh;

  static Factor factor(Words words, int field) {
    // The numbers 0 to 15, twice: of an index's bits the fifth, a neighbour's, changes nothing.
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0,      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
        0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const Words index = field ? _mm512_srli_epi16(words, unsigned(4 * field)) : words;
    return (__m512bh)_mm512_permutexvar_epi16(index, _mm512_load_si512(TABLE));
  }
  static Floats multiply(Factor factor, const float* x, Floats sums) {
    return _mm512_dpbf16_ps(sums, factor, (__m512bh)_mm512_loadu_si512(x));
  }
  static void arrange(const float* columns, float* x) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(x);
    for (int field = 0; field < 4; field++)
      for (int lane = 0; lane < 2 * LANES; lane++)
        halves[field * 2 * LANES + lane] = uint16_t(to_bits(columns[lane * 4 + field]) >> 16);
  }
};
#endif

// ---- the product

constexpr int64_t MAX_X_ROWS = 16;
constexpr int64_t STRIP = 8;           // rows of a weight that x stays in the cache for
constexpr int64_t CHUNK_BYTES = 16384;  // of x, within the first cache

struct X {
  const void* values;
  int64_t type, num_rows, width;
};

// x as a form reads it: [block, row] of the form's vectors, padded with zeros, and [block, row] of
// minus the zero point times the sums of the lanes' columns.
template <class Form>
struct Arranged {
  static constexpr int64_t COLUMNS = LANES * Form::COLUMNS;  // of a block
  static constexpr int64_t FLOATS = LANES * Form::VECTORS;

  const float *vectors, *offsets;

  static int64_t num_blocks(const X& x) { return divide_up(x.width, COLUMNS); }
  static int64_t num_floats(const X& x) { return num_blocks(x) * x.num_rows * (FLOATS + LANES); }

  static Arranged at(const X& x, float* scratch) {
    return {scratch, scratch + num_blocks(x) * x.num_rows * FLOATS};
  }

  // Shares the work with the threads around it, and waits for them.
  static void fill(const X& x, float zero_point, float* vectors) {
    float* offsets = vectors + num_blocks(x) * x.num_rows * FLOATS;
#pragma omp for
    for (int64_t place = 0; place < num_blocks(x) * x.num_rows; place++) {
      const int64_t first = place / x.num_rows * COLUMNS, row = place % x.num_rows;
      float columns[COLUMNS] = {};
      const int64_t count = std::min(COLUMNS, x.width - first);
      to_floats(x.values, x.type, row * x.width + first, count, columns);
      Form::arrange(columns, vectors + place * FLOATS);
      for (int64_t lane = 0; lane < LANES; lane++) {
        float total = 0;
        for (int64_t i = 0; i < Form::COLUMNS; i++) total += columns[lane * Form::COLUMNS + i];
        offsets[place * LANES + lane] = -zero_point * total;
      }
    }
  }
};

// A part of a weight's row, whose products with x are added to sums, [rows of x, LANES].
struct Part {
  int64_t row, begin, end;  // blocks
  float *scale, *minimum;   // scratch
  float* sums;
};

// The part's scales in float32, with zeros behind them; returns the index of the first.
int64_t read_scales(const Weight& weight, int64_t width, int64_t shift, int64_t begin, int64_t end,
                    const Part& part) {
  const int64_t first = begin >> shift, count = ((end - 1) >> shift) + 1 - first;
  const int64_t place = part.row * (width / weight.group) + first;
  to_floats(weight.scale, weight.scale_type, place, count, part.scale);
  store(part.scale + count, zeros());
  if (weight.minimum) {
    to_floats(weight.minimum, weight.minimum_type, place, count, part.minimum);
    // The sums it meets are multiplied by minus the zero point, a power of two.
    for (int64_t i = 0; i < count; i++) part.minimum[i] *= -1 / zero_point(weight);
    store(part.minimum + count, zeros());
  }
  return first;
}

// How far a column's index is shifted to that of its group.
int64_t group_shift(const Weight& weight) {
  for (int64_t shift = 4; shift < 63; shift++)
    if (weight.group == int64_t(1) << shift) return shift;
  return 63;  // one group, of any width
}

template <class Form, bool HAS_MINIMUM, bool IS_ONE>
void multiply_part(const Weight& weight, const X& x, Arranged<Form> arranged, const Part& part) {
  constexpr int64_t COLUMNS = Arranged<Form>::COLUMNS, FLOATS = Arranged<Form>::FLOATS;
  const int64_t num_x = IS_ONE ? 1 : x.num_rows;
  const int64_t shift = group_shift(weight);
  const int64_t first_group = read_scales(weight, x.width, shift, part.begin * COLUMNS,
                                          std::min(x.width, part.end * COLUMNS), part);
  alignas(64) uint32_t lane_groups[LANES];
  for (int64_t lane = 0; lane < LANES; lane++)
    lane_groups[lane] = uint32_t(lane * Form::COLUMNS >> shift);
  const Words lanes = load_words(lane_groups);
  const int64_t row_bytes = x.width * weight.bits / 8;
  const uint8_t* bytes = weight.packed + part.row * row_bytes;
  const uint8_t* limit = weight.packed + weight.num_rows * row_bytes;

  Floats sums[IS_ONE ? 1 : MAX_X_ROWS];
  for (int64_t m = 0; m < num_x; m++) sums[m] = load(part.sums + m * LANES);
  for (int64_t block = part.begin; block < part.end; block++) {
    const uint8_t* place = bytes + block * BLOCK_BYTES;
    Words words;
    if (place + BLOCK_BYTES <= limit) {
      words = load_words(place);
    } else {
      uint8_t rest[BLOCK_BYTES] = {};
      std::memcpy(rest, place, size_t(limit - place));
      words = load_words(rest);
    }
    __builtin_prefetch(place + PREFETCH_BYTES);
    typename Form::Factor factors[Form::VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < Form::VECTORS; i++) factors[i] = Form::factor(words, i);
    const int64_t group = (block * COLUMNS >> shift) - first_group;
    const Floats scale = take(part.scale + group, lanes);
    const float* vectors = arranged.vectors + block * num_x * FLOATS;
    const float* offsets = arranged.offsets + block * num_x * LANES;
    for (int64_t m = 0; m < num_x; m++, vectors += FLOATS, offsets += LANES) {
      Floats even = HAS_MINIMUM ? zeros() : load(offsets), odd = zeros();
#pragma GCC unroll 4
      for (int i = 0; i < Form::VECTORS; i += 2) {
        even = Form::multiply(factors[i], vectors + i * LANES, even);
        odd = Form::multiply(factors[i + 1], vectors + (i + 1) * LANES, odd);
      }
      sums[m] = multiply_add(add(even, odd), scale, sums[m]);
      if (HAS_MINIMUM) sums[m] = multiply_add(load(offsets), take(part.minimum + group, lanes), sums[m]);
    }
  }
  for (int64_t m = 0; m < num_x; m++) store(part.sums + m * LANES, sums[m]);
}

// A thread's scratch: the sums of a strip, and a row's scales and minima.
int64_t num_groups_padded(const X& x) { return divide_up(x.width, LINE * LINE) * LINE + 2 * LINE; }
int64_t num_thread_floats(const X& x) {
  return STRIP * x.num_rows * LANES + 2 * num_groups_padded(x);
}

template <class Form>
void multiply_rows(const Weight& weight, const X& x, int64_t begin, int64_t end,
                   const float* arranged, float* scratch) {
  using A = Arranged<Form>;
  const A at = A::at(x, const_cast<float*>(arranged));
  const bool is_one = x.num_rows == 1;
  auto multiply = weight.minimum
      ? (is_one ? multiply_part<Form, true, true> : multiply_part<Form, true, false>)
      : (is_one ? multiply_part<Form, false, true> : multiply_part<Form, false, false>);
  const int64_t num_blocks = A::num_blocks(x);
  const int64_t in_cache = std::max<int64_t>(1, CHUNK_BYTES / (4 * A::FLOATS * x.num_rows));
  const int64_t chunk = is_one ? num_blocks : in_cache;  // one row is read straight through
  const int64_t row_floats = x.num_rows * LANES;
  float* scale = scratch + STRIP * row_floats;
  float* minimum = scale + num_groups_padded(x);
  for (int64_t strip = begin; strip < end; strip += STRIP) {
    const int64_t stop = std::min(end, strip + STRIP);
    std::memset(scratch, 0, size_t(STRIP * row_floats) * 4);
    for (int64_t block = 0; block < num_blocks; block += chunk)
      for (int64_t row = strip; row < stop; row++)
        multiply(weight, x, at,
                 {row, block, std::min(num_blocks, block + chunk), scale, minimum,
                  scratch + (row - strip) * row_floats});
    for (int64_t row = strip; row < stop; row++)
      for (int64_t m = 0; m < x.num_rows; m++)
        put(weight.out, x.type, m * weight.num_rows + row,
            sum(load(scratch + (row - strip) * row_floats + m * LANES)));
  }
}

#if defined(LLAMAC_AVX512) && defined(__AVX512BF16__)
bool is_brain(const X& x) { return x.type == BFLOAT16; }
#else
using BrainForm = FloatForm<4>;
bool is_brain(const X&) { return false; }
#endif

// Calls the generic function with the form of this x and these bits.
template <class Function>
void with_form(const X& x, int64_t bits, Function function) {
  if (bits == 8) function(FloatForm<8>());
  else if (is_brain(x)) function(BrainForm());
  else function(FloatForm<4>());
}

// ---- unpacking

template <int BITS, int COUNT>
void unpack_columns(const uint8_t* packed, float scale, float minimum, int zero_point, float* out) {
  for (int i = 0; i < COUNT; i++) {
    const int value = BITS == 8 ? packed[i] : packed[i / 2] >> (4 * (i % 2)) & 15;
    out[i] = float(value - zero_point) * scale + minimum;
  }
}

// 8 columns at a time at least, which share a group.
template <int BITS>
void unpack_row(const Weight& weight, int64_t width, int64_t row, int64_t type, void* out) {
  constexpr int64_t SPAN = 16;
  const uint8_t* packed = weight.packed + row * (width * BITS / 8);
  const int64_t num_groups = width / weight.group, zero_point = weight.minimum ? 0 : 1 << (BITS - 1);
  for (int64_t group = 0; group < num_groups; group++) {
    float scale, minimum = 0;
    to_floats(weight.scale, weight.scale_type, row * num_groups + group, 1, &scale);
    if (weight.minimum)
      to_floats(weight.minimum, weight.minimum_type, row * num_groups + group, 1, &minimum);
    for (int64_t i = group * weight.group; i < (group + 1) * weight.group; i += SPAN) {
      float values[SPAN];
      const int64_t count = std::min(SPAN, (group + 1) * weight.group - i);
      if (count == SPAN)
        unpack_columns<BITS, SPAN>(packed + i * BITS / 8, scale, minimum, int(zero_point), values);
      else
        unpack_columns<BITS, 8>(packed + i * BITS / 8, scale, minimum, int(zero_point), values);
      if (type == FLOAT32)
        std::memcpy(static_cast<float*>(out) + i, values, size_t(count) * 4);
      else
        for (int64_t j = 0; j < count; j++) put(out, type, i + j, values[j]);
    }
  }
}

int64_t thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace

// Products of x with each weight, into its out, [num_x, its num_rows] of x's type. num_x is at most
// 16. Returns whether there was memory.
extern "C" int multiply_packed(const void* values, int64_t type, int64_t num_x, int64_t width,
                               const Weight* weights, int64_t num_weights, int64_t num_threads) {
  const X x{values, type, num_x, width};
  int64_t begins[2], size = 0;  // of x arranged for 4 bits and for 8, in scratch
  bool is_used[2] = {false, false};
  for (int64_t i = 0; i < num_weights; i++) is_used[weights[i].bits / 4 - 1] = true;
  for (int i = 0; i < 2; i++) {
    begins[i] = size;
    if (is_used[i])
      with_form(x, 4 * (i + 1), [&](auto form) { size += Arranged<decltype(form)>::num_floats(x); });
  }
  const size_t bytes = size_t(size + num_threads * num_thread_floats(x)) * 4;
  float* scratch = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!scratch) return 0;
#pragma omp parallel num_threads(int(num_threads))
  {
    const int64_t thread = thread_index(), count = thread_count();
    for (int i = 0; i < 2; i++)
      if (is_used[i])
        with_form(x, 4 * (i + 1), [&](auto form) {
          Arranged<decltype(form)>::fill(x, float(8 << (4 * i)), scratch + begins[i]);
        });
    for (int64_t i = 0; i < num_weights; i++) {
      const int64_t rows = weights[i].num_rows;
      with_form(x, weights[i].bits, [&](auto form) {
        multiply_rows<decltype(form)>(weights[i], x, rows * thread / count,
                                      rows * (thread + 1) / count,
                                      scratch + begins[weights[i].bits / 4 - 1],
                                      scratch + size + thread * num_thread_floats(x));
      });
    }
  }
  std::free(scratch);
  return 1;
}

// The weight's numbers into its out, [its num_rows, width] of a type.
extern "C" void unpack(const Weight* weight, int64_t width, int64_t type, int64_t num_threads) {
  const int64_t row_bytes = width * (type == FLOAT32 ? 4 : 2);
#pragma omp parallel for num_threads(int(num_threads))
  for (int64_t row = 0; row < weight->num_rows; row++) {
    void* out = static_cast<char*>(weight->out) + row * row_bytes;
    if (weight->bits == 8) unpack_row<8>(*weight, width, row, type, out);
    else unpack_row<4>(*weight, width, row, type, out);
  }
}
