// Launches a kernel as planned: raises the limit on dynamic shared memory where the plan asks for more than
// the default.
#pragma once

#include "core/cuda.h"

namespace torchlin::gpu {

inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  TORCHLIN_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

template <class Kernel, class... Args>
void launch(cudaStream_t stream, Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
            const Args&... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    TORCHLIN_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  TORCHLIN_LAUNCH_CHECK();
}

}  // namespace torchlin::gpu
