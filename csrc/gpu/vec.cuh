// Aligned short vectors: one load or store instruction of up to 16 bytes.
#pragma once

#include "gpu/device.cuh"

namespace torchlin::gpu {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

inline constexpr int kVectorBytes = 16;

namespace detail {
// Carried as whole words: the compiler keeps a vector of 16-bit elements in one instruction only if it never
// sees the elements.
template <int Bytes>
struct words;
#if defined(__CUDACC__)
template <>
struct words<16> {
  using type = uint4;
};
template <>
struct words<8> {
  using type = uint2;
};
#else
template <>
struct words<16> {
  struct alignas(16) type {
    uint32_t w[4];
  };
};
template <>
struct words<8> {
  struct alignas(8) type {
    uint32_t w[2];
  };
};
#endif
template <>
struct words<4> {
  using type = uint32_t;
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  // A memcpy here ends as single-byte loads: nvcc forwards it to the memory behind `from`.
  return __builtin_bit_cast(To, from);
}
}  // namespace detail

using detail::bits_as;

#if defined(__CUDACC__)
#define TORCHLIN_CHECK_ALIGNED(p, bytes)
#else
#define TORCHLIN_CHECK_ALIGNED(p, bytes) \
  if (reinterpret_cast<uintptr_t>(p) % (bytes)) simt::detail::fail("global memory misaligned: " #bytes)
#endif

// Reads a Vec from global memory; `p` must be aligned to it.
template <class V, class T>
__device__ __forceinline__ V load_vec(const T* p) {
  using W = typename detail::words<sizeof(V)>::type;
  TORCHLIN_CHECK_ALIGNED(p, sizeof(W));
  return bits_as<V>(*reinterpret_cast<const W*>(p));
}

template <class V, class T>
__device__ __forceinline__ void store_vec(T* p, const V& v) {
  using W = typename detail::words<sizeof(V)>::type;
  TORCHLIN_CHECK_ALIGNED(p, sizeof(W));
  *reinterpret_cast<W*>(p) = bits_as<W>(v);
}

// The same for shared memory.
template <class V, class T>
__device__ __forceinline__ V load_shared(shared_ptr<T> p) {
  using W = typename detail::words<sizeof(V)>::type;
  return bits_as<V>(static_cast<W>(*shared_cast<W>(p)));
}

template <class V, class T>
__device__ __forceinline__ void store_shared(shared_ptr<T> p, const V& v) {
  using W = typename detail::words<sizeof(V)>::type;
  *shared_cast<W>(p) = bits_as<W>(v);
}

}  // namespace torchlin::gpu
