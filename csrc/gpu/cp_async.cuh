// Copies from global to shared memory that run while the thread computes (cp.async, compute capability 8.0).
#pragma once

#include "gpu/vec.cuh"

namespace torchlin::gpu {

#if defined(__CUDACC__)

__device__ __forceinline__ void cp_async_16(shared_ptr<uint32_t> to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Left` of the thread's latest groups are in flight; other threads' copies need a
// barrier after it.
template <int Left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

#else

inline void cp_async_16(shared_ptr<uint32_t> to, const void* from) {
  using Words = detail::words<16>::type;
  simt::async_copy([=] { shared_cast<Words>(to).store(*static_cast<const Words*>(from)); });
}
inline void cp_async_commit() { simt::async_commit(); }
template <int Left>
void cp_async_wait() {
  simt::async_wait(Left);
}

#endif

}  // namespace torchlin::gpu
