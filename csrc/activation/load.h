// CUDA kernels that were compiled at run time, beside those of the library. torchlin/ops/activation_formula.py has their source.
#pragma once

#include <cstdint>

#include "activation/kernel.cuh"

namespace torchlin::activation {

// Null if none of that id was loaded. Its kernels are handles for cudaLaunchKernel: <<<>>> cannot call them.
const Functor* loaded(int64_t id);

}  // namespace torchlin::activation
