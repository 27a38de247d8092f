// What op.cpp and the CPU kernels agree on: a quantized weight, and the entry points of a level.
#pragma once

#include <cstdint>

#include "core/scratch.h"
#include "grid/layout.h"
#include "grid/nearest.h"

namespace torchlin::grid {

enum class Purpose { kX, kRow, kCodes, kTable, kSums, kCount };
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

// One call of the linear layer. `x` and `y` are rows of the element type whose kernel runs.
struct Linear {
  Weight weight;
  const void* x;
  const void* bias;  // or null
  void* y;
  int64_t batch;
  const float* ready = nullptr;  // x, as `prepare` left it
};

// Of one element type.
struct LinearKernel {
  int64_t (*prepared)(const Linear&);              // floats that `prepare` writes
  void (*prepare)(const Linear&, float* ready);    // x as the rows read it, once a call
  void (*rows)(const Linear&, int64_t begin, int64_t end);  // outputs [begin, end) of every row of x
};

struct Kernel {
  void (*encode)(const NearestIndex&, const float* x, int64_t k, void* codes, int64_t begin, int64_t end);
  void (*decode)(const void* codes, const float* grid, int64_t n, int64_t p, float* points, int64_t begin, int64_t end);
  void (*pack)(const void* codes, int64_t count, int64_t n, uint8_t* packed, int64_t begin, int64_t end);
  void (*unpack)(const uint8_t* packed, int64_t n, int64_t count, void* codes, int64_t begin, int64_t end);
  void (*dequantize)(const Weight&, float* weight, int64_t begin, int64_t end);
  LinearKernel linear[3];  // float, f16, bf16
};

}  // namespace torchlin::grid
