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

}  // namespace torchlin::gpu
