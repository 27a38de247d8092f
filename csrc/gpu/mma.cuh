// Tensor cores: D = A B + C for one warp, A 16x16, B 16x8, fp32 accumulators.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, mma.m16n8k16):
//   a[0] = A[g][2t, 2t+1]  a[1] = A[g+8][2t, 2t+1]  a[2] = A[g][2t+8, 2t+9]  a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]  b[1] = B[2t+8, 2t+9][g]   (two 16-bit elements a register, the lower index in the
//   lower half) d[0], d[1] = D[g][2t, 2t+1]   d[2], d[3] = D[g+8][2t, 2t+1]
#pragma once

#include <cmath>

#include "gpu/math.cuh"

namespace torchlin::gpu {

#if defined(__CUDACC__)

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Bytes (0-3 of lo, 4-7 of hi) picked by the four hexadecimal digits of `selector`, lowest digit first.
__device__ __forceinline__ uint32_t byte_permute(uint32_t lo, uint32_t hi, uint32_t selector) {
  return __byte_perm(lo, hi, selector);
}

#else

// The adders of the hardware keep fewer bits than a rounded fp32 sum and cut the rest off; emulated by
// truncation to fp32.
inline float truncate_to_float(double v) {
  const float f = static_cast<float>(v);
  return std::isfinite(f) && std::fabs(static_cast<double>(f)) > std::fabs(v) ? std::nextafterf(f, 0.0f) : f;
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  int site = __builtin_LINE()) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  simt::warp_post(simt::WarpOp::matrix, 0xffffffffu, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, site);
  const auto half_of = [](uint32_t word, int upper) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * upper);
    return static_cast<double>(static_cast<float>(T(bits, T::from_bits())));
  };
  const int lane = static_cast<int>(simt::lane());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const auto from_a = simt::posted<Fragments>(row % 8 * 4 + k % 8 / 2);
      const auto from_b = simt::posted<Fragments>(column * 4 + k % 8 / 2);
      sum += half_of(from_a.a[k / 8 * 2 + row / 8], k % 2) * half_of(from_b.b[k / 8], k % 2);
    }
    d[i] = truncate_to_float(sum);
  }
}

inline uint32_t byte_permute(uint32_t lo, uint32_t hi, uint32_t selector) {
  const uint64_t bytes = uint64_t{hi} << 32 | lo;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

#endif

}  // namespace torchlin::gpu
