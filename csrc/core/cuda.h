// What every op.cu needs from torch: its device made current, torch's stream (never the default one), checked launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "core/tensor.h"

namespace torchlin {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace torchlin

#define TORCHLIN_CUDA_CHECK(expr) STD_CUDA_CHECK(expr)
#define TORCHLIN_LAUNCH_CHECK() STD_CUDA_KERNEL_LAUNCH_CHECK()
