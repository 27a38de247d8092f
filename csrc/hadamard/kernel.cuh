// What the two CUDA kernels of the Hadamard transform share. y = scale * post o H (pre o x), accumulated in
// float (double for double), rounded once, at the store. `pre` and `post` are the sign vector before or after
// the transform, or null.
//
//   kernel_rows.cuh  powers of two up to 2^15 along a contiguous axis: radix-16..64 in registers, or tensor
//                    cores and registers
//   kernel_tile.cuh  everything else: any K * 2^k, any strides, double, and the passes of orders beyond one
//                    block
#pragma once

#include "gpu/math.cuh"

namespace torchlin::hadamard {

using namespace torchlin::gpu;

inline constexpr int kMaxDims = 6;

// Row r, counted with the first dimension fastest, begins at sum_d index_d * stride[d] in x, in y and in the
// signs.
struct RowMap {
  int ndim;
  int64_t size[kMaxDims], x[kMaxDims], y[kMaxDims], signs[kMaxDims];
};

template <class A>
struct Operands {
  const void* x;
  void* y;
  const A* pre;
  const A* post;
  A scale;
  int64_t rows;
  RowMap map;
  int64_t x_stride, y_stride, sign_stride;  // along the transformed axis, in elements
  bool x_vector, y_vector, sign_vector;     // 16-byte accesses are aligned, and the vectors contiguous
};

struct Offsets {
  int64_t x, y, signs;
};

__device__ __forceinline__ Offsets row_offsets(const RowMap& map, int64_t row) {
  if (map.ndim == 1) return {row * map.x[0], row * map.y[0], row * map.signs[0]};
  Offsets o{0, 0, 0};
  TORCHLIN_NO_UNROLL
  for (int d = 0; d < map.ndim; ++d) {
    int64_t index = row;
    if (d + 1 < map.ndim) {
      // 64-bit division is an order of magnitude dearer.
      const int64_t rest =
          row >> 31 || map.size[d] >> 31
              ? row / map.size[d]
              : static_cast<int64_t>(static_cast<uint32_t>(row) / static_cast<uint32_t>(map.size[d]));
      index = row - rest * map.size[d];
      row = rest;
    }
    o.x += index * map.x[d];
    o.y += index * map.y[d];
    o.signs += index * map.signs[d];
  }
  return o;
}

// The stage of the butterfly over bit J of the register index.
template <int J, int N, class A>
__device__ __forceinline__ void butterfly(A (&v)[N]) {
  TORCHLIN_UNROLL
  for (int i = 0; i < N; ++i) {
    if (i >> J & 1) continue;
    const A a = v[i], b = v[i | 1 << J];
    v[i] = a + b;
    v[i | 1 << J] = a - b;
  }
}

}  // namespace torchlin::hadamard
