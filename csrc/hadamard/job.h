// What op.cpp and the kernels agree on: the geometry of one call, the plan for multiplying by H_K, scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace torchlin::hadamard {

// How to multiply by a K x K matrix of +-1 in about K/g additions per element ("four Russians"): for every group of g
// columns all 2^(g-1) combinations +-c_0 +- ... +-c_(g-1) up to sign are made once, and each row then adds one of them per
// group. If the matrix is S (x) [[1,1],[1,-1]] + D (x) [[1,-1],[-1,-1]], D diagonal, S + D full of +-1 (Paley II, or a
// Kronecker product with H_2), `paired` halves that: with u = x_0 + x_1 and v = x_0 - x_1,
// y_0 = (S + D) u - 2d x_1 and y_1 = (S + D) v - 2d x_0.
struct CorePlan {
  struct Group {
    int32_t column, width, entry;  // first column (pair), number of columns, first table entry within its chunk
  };
  struct Chunk {
    int32_t first_group, groups, entries, first_term;
  };
  struct Term {
    int32_t entry;
    float sign;
  };

  static constexpr int kSlotBlock = 2;     // rows that the kernel sums side by side
  static constexpr int kChunkGroups = 8;   // at most so many terms of a row at a time
  static constexpr int kChunkEntries = 128;  // and so many table entries, to stay in L1

  int32_t K = 1, rows = 1;  // rows = K, or K/2 when paired
  bool paired = false;
  int32_t max_entries = 0;    // table entries of the largest chunk (per half when paired)
  std::vector<Group> groups;
  std::vector<Chunk> chunks;  // so many groups at a time that their table stays in L1
  std::vector<Term> terms;    // [chunk][block of slots][group of the chunk][row of the block]
  std::vector<float> extras;  // -2d of each pair of rows, or 0; paired only

  CorePlan(const int8_t* matrix, int32_t K, bool transpose);
};

inline constexpr int kMaxGroup = 6;

// Where, in a table of a group, the combination with these signs (relative to the first) stands. The kernel makes the
// combinations of the first (g+1)/2 columns and of the rest, and then every sum and difference of one of each.
inline int32_t combination_index(const int8_t* signs, int width) {
  const int half = (width + 1) / 2;
  int first = 0, second = 0;
  for (int i = 1; i < half; ++i) first |= (signs[i] != signs[0]) << (i - 1);
  if (width == 1) return 0;
  for (int i = half + 1; i < width; ++i) second |= (signs[i] != signs[half]) << (i - half - 1);
  return (first << (width - half - 1) | second) << 1 | (signs[half] != signs[0]);
}

inline CorePlan::CorePlan(const int8_t* matrix, int32_t order, bool transpose) : K(order), rows(order) {
  const auto at = [&](int32_t i, int32_t j) { return transpose ? matrix[j * K + i] : matrix[i * K + j]; };

  std::vector<int8_t> m;  // the +-1 matrix whose rows are summed: H, or S + D
  paired = K % 2 == 0 && K >= 4;
  for (int32_t i = 0; paired && i < K / 2; ++i) {
    extras.push_back(0);
    for (int32_t j = 0; paired && j < K / 2; ++j) {
      const int8_t a = at(2 * i, 2 * j), b = at(2 * i, 2 * j + 1), c = at(2 * i + 1, 2 * j), d = at(2 * i + 1, 2 * j + 1);
      m.push_back(a);
      if (i == j && b == -a && c == -a && d == -a) {
        extras[i] = -2.f * a;
      } else {
        paired = b == a && c == a && d == -a;
      }
    }
  }
  if (paired) {
    rows = K / 2;
  } else {
    extras.clear();
    m.clear();
    for (int32_t i = 0; i < K; ++i) {
      for (int32_t j = 0; j < K; ++j) m.push_back(at(i, j));
    }
  }

  // Cost of an element, in cycles where a table store and an addition from the table take about one each.
  int width = 1;
  double best = 1e30;
  for (int g = 1; g <= kMaxGroup; ++g) {
    const double cost = 1.2 * (1 << (g - 1)) / g + (rows + g - 1) / g;
    if (cost < best) best = cost, width = g;
  }
  // Chunks of about equal size.
  const int32_t all = (rows + width - 1) / width, most = std::min(kChunkGroups, std::max(1, kChunkEntries >> (width - 1)));
  const int32_t parts = (all + most - 1) / most, each = (all + parts - 1) / parts;
  for (int32_t column = 0; column < rows; column += width) {
    if (chunks.empty() || chunks.back().groups == each) chunks.push_back({static_cast<int32_t>(groups.size()), 0, 0, 0});
    Chunk& chunk = chunks.back();
    groups.push_back({column, std::min<int32_t>(width, rows - column), chunk.entries});
    chunk.groups += 1;
    chunk.entries += 1 << (groups.back().width - 1);
    max_entries = std::max(max_entries, chunk.entries);
  }
  const int32_t block = paired ? kSlotBlock / 2 : kSlotBlock;  // divides the rows of every matrix there is above order 1
  for (Chunk& chunk : chunks) {
    chunk.first_term = static_cast<int32_t>(terms.size());
    for (int32_t row = 0; row < rows; row += block) {
      for (int32_t g = 0; g < chunk.groups; ++g) {
        const Group& group = groups[chunk.first_group + g];
        for (int32_t r = row; r < row + block; ++r) {
          const int8_t* signs = &m[r * rows + group.column];
          terms.push_back({group.entry + combination_index(signs, group.width), static_cast<float>(signs[0])});
        }
      }
    }
  }
}

// One dimension of the batch, outermost first; strides in elements. Blocks of a blocked transform are one more dimension,
// the only one along which the signs move.
struct Dim {
  int64_t size, src, dst, sign;
};

struct Job {
  int64_t order = 1;              // length of one transform, K * 2^log2
  int log2 = 0;
  const CorePlan* core = nullptr;  // null: K = 1
  double scale = 1;
  const void* signs = nullptr;    // in the compute type
  bool signs_last = false;        // multiply by the signs at the store rather than at the load
  int64_t src_step = 1, dst_step = 1;  // between elements of one transform
  int64_t rows = 1;               // transforms in all
  int ndim = 0;
  Dim dims[64];

  bool contiguous() const { return src_step == 1 && dst_step == 1; }
};

// The entry points of one element type at one CPU level (kernel_cpu.h), in the order float, double, f16, bf16.
struct Kernel {
  int64_t (*units)(const Job&);
  void (*run)(const Job&, const void* src, void* dst, int64_t begin, int64_t end);
  void (*split)(const Job&, int64_t* blocks, int64_t* width);
  void (*run_blocks)(const Job&, const void* src, void* work, const void* signs, int64_t begin, int64_t end);
  void (*run_columns)(const Job&, const void* work, void* dst, const void* signs, int64_t begin, int64_t end);
};

// Memory that a thread keeps between calls, one piece per purpose. Pieces above kKeep go back after the call.
class Scratch {
 public:
  enum Purpose { kGathered, kRow, kPacked, kPanel, kTable, kSums, kCount };

  template <class C>
  static C* get(Purpose purpose, int64_t count) {
    return static_cast<C*>(pieces()[purpose].get(static_cast<size_t>(count) * sizeof(C)));
  }
  static void trim() {
    for (Piece* p = pieces(); p < pieces() + kCount; ++p) {
      if (p->size > kKeep) p->release();
    }
  }

 private:
  static constexpr size_t kKeep = size_t{4} << 20;
  struct Piece {
    void* data = nullptr;
    size_t size = 0;
    void* get(size_t bytes) {
      if (bytes > size) {
        release();
        bytes = (bytes + 4095) & ~size_t{4095};
        data = std::aligned_alloc(4096, bytes);
        if (data == nullptr) throw std::bad_alloc();
        size = bytes;
      }
      return data;
    }
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
    ~Piece() { release(); }
  };
  static Piece* pieces() {
    thread_local Piece list[kCount];
    return list;
  }
};

}  // namespace torchlin::hadamard
