// Which of OpenMP's threads this is, and what each of them does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "numbers.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

int64_t thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The rows of several weights in pieces. Every thread has as many rows, which stay in its caches for
// the next time, and takes pieces that others have left when it has done its own.
//
// A thread's rows of a weight may lie in several runs, each read straight through: a piece has then
// as many rows of every run, and the next piece those behind them.
template <class Weight>
class RowPieces {
 public:
  // All weights have `width` columns; bits_of gives those of a weight's numbers. Of one run a piece
  // has a multiple of the rows that a product takes at once.
  template <class Function>
  RowPieces(const Weight* weights, int64_t num_weights, int64_t width, int64_t num_threads,
            int64_t num_runs, int64_t at_once, Function bits_of)
      : num_runs_(num_runs), shares_(size_t(num_threads)) {
    for (int64_t thread = 0; thread < num_threads; thread++) {
      Share& share = shares_[size_t(thread)];
      for (int64_t i = 0; i < num_weights; i++) {
        const int64_t all = weights[i].num_rows, row_bytes = width * bits_of(weights[i]) / 8;
        const auto bound = [&](int64_t of) {
          return std::min(divide_up(all * of, num_threads * at_once) * at_once, all);
        };
        const int64_t first = bound(thread), rows = bound(thread + 1) - first;
        const int64_t fitting = PIECE_BYTES / std::max<int64_t>(row_bytes * num_runs, 1);
        const int64_t unit = num_runs == 1 ? at_once : 1;
        const int64_t each = divide_up(std::max<int64_t>(fitting, 1), unit) * unit;
        const int64_t length = rows / num_runs;
        share.parts.push_back({share.end, first, length, each, rows % num_runs});
        share.end += divide_up(length, each) + (rows % num_runs > 0);
      }
    }
  }

  // Called by each thread; the function gets a weight's index, the first and last row of a piece,
  // and how far the same rows of the next run are; 0 where there is no other.
  template <class Function>
  void run(Function function) {
    const size_t own = size_t(thread_index()), count = shares_.size();
    for (size_t i = 0; i < count; i++) {
      Share& share = shares_[(own + i) % count];
      for (int64_t piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        size_t weight = share.parts.size() - 1;
        while (piece < share.parts[weight].begin) weight--;
        const Part& part = share.parts[weight];
        const int64_t row = (piece - part.begin) * part.each;
        if (row < part.length) {
          const int64_t step = num_runs_ > 1 ? part.length : 0;
          function(int64_t(weight), part.first + row,
                   part.first + std::min(row + part.each, part.length), step);
        } else {
          const int64_t rest = part.first + part.length * num_runs_;
          function(int64_t(weight), rest, rest + part.rest, int64_t(0));
        }
      }
    }
  }

 private:
  static constexpr int64_t PIECE_BYTES = 1 << 17;
  struct Part {  // a thread's rows of a weight; `rest` are left behind the runs
    int64_t begin, first, length, each, rest;
  };
  struct alignas(64) Share {
    std::atomic<int64_t> next = 0;
    int64_t end = 0;
    std::vector<Part> parts;
  };
  int64_t num_runs_;
  std::vector<Share> shares_;
};

}  // namespace
