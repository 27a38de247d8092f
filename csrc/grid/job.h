// What op.cpp and the CPU kernels agree on: a quantized weight, and the entry points of a level.
#pragma once

#include <cstdint>

#include "core/scratch.h"
#include "grid/layout.h"
#include "grid/nearest.h"

namespace torchlin::grid {

enum class Purpose { kReady, kTable, kCodes, kWeights, kSums, kScales, kCount };
using Scratch = ScratchOf<Purpose>;

struct Weight {
  const uint8_t* packed;  // (out, row_bytes)
  const void* scales;     // (out, blocks), float16 or float32
  bool half_scales;
  const float* grid;  // (n, p)
  int64_t n, p;
  int64_t out, in, block, blocks;
  int64_t count, row_bytes;  // codes and bytes of a row
  Layout layout;
};

// One call of the linear layer. `x`, `bias` (or null) and `y` are of the element type whose kernel runs.
struct Linear {
  Weight weight;
  const void* x;
  const void* bias;
  void* y;
  int64_t batch;
  const float* ready = nullptr;  // what `prepare` made of x and the grid
};

// What the kernels of permute_cpu.h and bytes_cpu.h know of a row: its steps, what scales them (nothing where a row has one
// scale), and the points as bytes, in multiples of `unit`.
struct PermutePlan {
  int64_t steps;
  const int32_t* first = nullptr;
  const int32_t* lane = nullptr;
  const uint8_t* tables = nullptr;
  float unit = 0;
};

// Of one element type.
struct LinearKernel {
  int64_t (*prepared)(const Linear&);                       // floats that `prepare` writes
  void (*prepare)(const Linear&, float* ready);             // once a call
  void (*rows)(const Linear&, int64_t begin, int64_t end);  // outputs [begin, end) of every row of x
};

struct Kernel {
  void (*encode)(const NearestIndex&, const float* x, int64_t k, void* codes, int64_t begin, int64_t end);
  void (*decode)(const void* codes, const float* grid, int64_t n, int64_t p, float* points, int64_t begin, int64_t end);
  void (*pack)(const void* codes, int64_t count, int64_t n, uint8_t* packed, int64_t begin, int64_t end);
  void (*unpack)(const uint8_t* packed, int64_t n, int64_t count, void* codes, int64_t begin, int64_t end);
  void (*dequantize)(const Weight&, const float* table, float* weight, int64_t begin, int64_t end);
  LinearKernel linear[3];  // float, f16, bf16
};

// Points as the lookups read them: 1, 2, 4 or 8 coordinates each, filled up with zeros.
constexpr int64_t table_step(int64_t p) { return p <= 2 ? p : p <= 4 ? 4 : 8; }

inline void fill_table(const float* grid, int64_t n, int64_t p, int64_t step, float* table) {
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t q = 0; q < step; ++q) table[c * step + q] = q < p ? grid[c * p + q] : 0;
  }
}

}  // namespace torchlin::grid
