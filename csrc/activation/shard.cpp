// The kernels of one group of functors: compiled once for each of the files that catalogue/cpp_code.py writes.
#include <iterator>

#include "activation/kernel.h"

#define TORCHLIN_KERNEL "activation/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin::activation {
extern const Table TORCHLIN_SHARD_NAME;
const Table TORCHLIN_SHARD_NAME TORCHLIN_ACTIVATION_TABLE;
}  // namespace torchlin::activation
