// Products that are rounded before anything is added to them, whatever the compiler would like to contract: bits of the CPU kernels.
#pragma once

#include "gpu/scalar.cuh"

namespace torchlin::gpu {

TORCHLIN_INLINE float times(float a, float b) {
#if defined(__CUDACC__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
TORCHLIN_INLINE double times(double a, double b) {
#if defined(__CUDACC__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace torchlin::gpu
