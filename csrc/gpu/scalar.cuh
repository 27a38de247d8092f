// Operations on one float that a device has an instruction for, each with an emulated body: what gpu/elementary.cuh builds on.
#pragma once

#include "gpu/device.cuh"

#if !defined(__CUDACC__)
#include <cmath>

#include "simd/half.h"
#endif

#define TORCHLIN_INLINE __device__ __forceinline__

namespace torchlin::gpu {

template <class To, class From>
TORCHLIN_INLINE To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}
TORCHLIN_INLINE int as_int(float u) { return bit_cast<int>(u); }
TORCHLIN_INLINE float as_float(int u) { return bit_cast<float>(u); }

#if defined(__CUDACC__)

// a*b + c in one rounding.
TORCHLIN_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// 1/u within one unit; 0 and infinity where u or the result is subnormal.
TORCHLIN_INLINE float reciprocal(float u) {
  float v;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(u));
  return v;
}
// 1/sqrt(u) within two units; u subnormal counts as 0.
TORCHLIN_INLINE float reciprocal_root(float u) {
  float v;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(u));
  return v;
}
TORCHLIN_INLINE float exponential(float u) { return expf(u); }
// 2^u within two units, for |u| < 126.
TORCHLIN_INLINE float exponential2(float u) {
  float v;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(u));
  return v;
}
TORCHLIN_INLINE float power(float u, float v) { return powf(u, v); }
// condition ? a : b with both computed: of two long branches a compiler makes jumps, and a warp goes both ways.
TORCHLIN_INLINE float choose(bool condition, float a, float b) {
  float v;
  asm("{.reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p;}"
      : "=f"(v)
      : "f"(a), "f"(b), "r"(static_cast<int>(condition)));
  return v;
}
// NaN if either is.
TORCHLIN_INLINE float smaller(float a, float b) {
  float v;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
TORCHLIN_INLINE float larger(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
TORCHLIN_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// The upper word of (high, low) << (count mod 32).
TORCHLIN_INLINE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t count) {
  return __funnelshift_l(low, high, count);
}
// Data that no one writes while the kernel runs.
template <class T>
TORCHLIN_INLINE T load_constant(const T* p) {
  return __ldg(p);
}

// Two 16-bit floats in a word, the first in the lower half.
TORCHLIN_INLINE float first_half(uint32_t word) {
  float v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(v) : "r"(word));
  return v;
}
TORCHLIN_INLINE float second_half(uint32_t word) {
  float v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(v) : "r"(word));
  return v;
}
TORCHLIN_INLINE uint32_t pack_half(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
TORCHLIN_INLINE uint32_t pack_bfloat16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

#else

inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float flush(float u) { return std::fabs(u) < 0x1p-126f ? std::copysign(0.0f, u) : u; }
inline float reciprocal(float u) { return flush(1.0f / flush(u)); }
inline float reciprocal_root(float u) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(flush(u)))); }
inline float exponential(float u) { return std::exp(u); }
inline float exponential2(float u) { return std::exp2(u); }
inline float power(float u, float v) { return std::pow(u, v); }
inline float choose(bool condition, float a, float b) { return condition ? a : b; }
inline float smaller(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }
inline float larger(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t count) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (count & 31) >> 32);
}
template <class T>
T load_constant(const T* p) {
  return *p;
}
inline float first_half(uint32_t word) { return to_float(f16{static_cast<uint16_t>(word)}); }
inline float second_half(uint32_t word) { return to_float(f16{static_cast<uint16_t>(word >> 16)}); }
inline uint32_t pack_half(float first, float second) {
  return to_f16(first).bits | static_cast<uint32_t>(to_f16(second).bits) << 16;
}
inline uint32_t pack_bfloat16(float first, float second) {
  return to_bf16(first).bits | static_cast<uint32_t>(to_bf16(second).bits) << 16;
}

#endif

TORCHLIN_INLINE float first_bfloat16(uint32_t word) { return bit_cast<float>(word << 16); }
TORCHLIN_INLINE float second_bfloat16(uint32_t word) { return bit_cast<float>(word & 0xffff0000u); }

}  // namespace torchlin::gpu
