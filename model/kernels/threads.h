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

// The rows of several weights in pieces. Every thread has as many, which stay in its caches for the
// next time, and takes what others have left when it has done its own.
template <class Weight>
class RowPieces {
 public:
  // All weights have `width` columns; bits_of gives those of a weight's numbers. A piece is a multiple
  // of the rows that a product takes at once.
  template <class Function>
  RowPieces(const Weight* weights, int64_t num_weights, int64_t width, int64_t num_threads,
            Function bits_of, int64_t at_once = 8)
      : shares_(size_t(num_threads)) {
    int64_t num_pieces = 0;
    for (int64_t i = 0; i < num_weights; i++) {
      const int64_t rows = weights[i].num_rows, row_bytes = width * bits_of(weights[i]) / 8;
      const int64_t fitting = PIECE_BYTES / std::max<int64_t>(row_bytes, 1);
      const int64_t fair = divide_up(rows, num_threads);
      const int64_t each = divide_up(std::min(fitting, fair), at_once) * at_once;
      runs_.push_back({num_pieces, each, rows});
      num_pieces += divide_up(rows, each);
    }
    for (int64_t i = 0; i < num_threads; i++) {
      shares_[size_t(i)].next = num_pieces * i / num_threads;
      shares_[size_t(i)].end = num_pieces * (i + 1) / num_threads;
    }
  }

  // Called by each thread; the function gets a weight's index, and the first and last row of a piece.
  template <class Function>
  void run(Function function) {
    const size_t own = size_t(thread_index()), count = shares_.size();
    for (size_t i = 0; i < count; i++) {
      Share& share = shares_[(own + i) % count];
      for (int64_t piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        size_t weight = runs_.size() - 1;
        while (piece < runs_[weight].begin) weight--;
        const Run& of = runs_[weight];
        const int64_t first = (piece - of.begin) * of.rows;
        function(int64_t(weight), first, std::min(first + of.rows, of.num_rows));
      }
    }
  }

 private:
  static constexpr int64_t PIECE_BYTES = 1 << 18;
  struct Run {
    int64_t begin, rows, num_rows;
  };
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Run> runs_;
  std::vector<Share> shares_;
};

}  // namespace
