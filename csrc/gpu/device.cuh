// The ground that every kernel stands on: nvcc compiles it for a device, g++ for the emulator in tests/simt.
//
// Kernels live in .cuh files without torch and without launches, take dynamic shared memory only, through
// dynamic_shared<T>(), call warp operations with the full mask, reach every barrier with every thread, and
// reach PTX only through a wrapper that has an emulated body (mma.cuh, cp_async.cuh).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if !defined(__CUDACC__)
#include "simt.h"
#endif

#if defined(__CUDACC__)
#define TORCHLIN_UNROLL _Pragma("unroll")
#define TORCHLIN_NO_UNROLL _Pragma("unroll 1")
#else
#define TORCHLIN_UNROLL
#define TORCHLIN_NO_UNROLL
#endif

namespace torchlin::gpu {

#if defined(__CUDACC__)

template <class T>
using shared_ptr = T*;

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char raw_shared_memory[];
  return reinterpret_cast<T*>(raw_shared_memory);
}

template <class U, class T>
__device__ __forceinline__ U* shared_cast(T* p) {
  return reinterpret_cast<U*>(p);
}

#else

using simt::shared_ptr;

template <class T>
shared_ptr<T> dynamic_shared() {
  return shared_ptr<T>(0);
}

template <class U, class T>
shared_ptr<U> shared_cast(shared_ptr<T> p) {
  return p.template cast<U>();
}

#endif

template <int I>
using constant = std::integral_constant<int, I>;

template <class F, int... I>
__device__ __forceinline__ void static_for_each(F&& f, std::integer_sequence<int, I...>) {
  (f(constant<I>{}), ...);
}

// f(constant<0>{}), ..., f(constant<N - 1>{}): register arrays indexed inside are indexed by constants,
// whatever the optimiser.
template <int N, class F>
__device__ __forceinline__ void static_for(F&& f) {
  static_for_each(f, std::make_integer_sequence<int, N>{});
}

}  // namespace torchlin::gpu
