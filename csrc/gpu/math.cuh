// Element types of kernels, and what arithmetic is done in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "gpu/device.cuh"
#include "gpu/vec.cuh"

namespace torchlin::gpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ accumulate_t<T> widen(T v) {
  return static_cast<accumulate_t<T>>(v);
}

// The one rounding of an op: from the accumulation type to the element type.
template <class T, class A>
__device__ __forceinline__ T narrow(A v) {
  return static_cast<T>(v);
}

// N roundings at once: 16-bit types are converted in pairs, one instruction a pair.
template <class T, int N, class F>
__device__ __forceinline__ Vec<T, N> narrow_vec(F&& value) {
  Vec<T, N> out;
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    struct Words {
      uint32_t w[N / 2];
    } words;
    static_for<N / 2>([&](auto i) {
      const float lo = value(2 * i.value), hi = value(2 * i.value + 1);
      if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words.w[i.value]) : "f"(hi), "f"(lo));
      } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.w[i.value]) : "f"(hi), "f"(lo));
      }
    });
    return bits_as<Vec<T, N>>(words);
  }
#endif
  static_for<N>([&](auto i) { out[i.value] = narrow<T>(value(i.value)); });
  return out;
}

}  // namespace torchlin::gpu
