// Launches a kernel as planned: raises the limit on dynamic shared memory where the plan asks for more than
// the default.
#pragma once

#include <type_traits>

#include "core/cuda.h"

namespace torchlin::gpu {

inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  TORCHLIN_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// `kernel` may also be the handle of one that was loaded at run time, which <<<>>> could not launch.
template <class... Parameters>
void launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            const std::common_type_t<Parameters>&... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultSharedBytes) {
    TORCHLIN_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes)));
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  TORCHLIN_CUDA_CHECK(
      cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(threads)), pointers, shared_bytes, stream));
}

}  // namespace torchlin::gpu
