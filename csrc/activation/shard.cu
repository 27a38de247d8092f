// The CUDA kernels of one group of functors: compiled once for each of the files that catalogue/cpp_code.py writes.
#include "activation/kernel.cuh"

namespace torchlin::activation {

#include TORCHLIN_SHARD_FILE

namespace {
const Functor kFunctors[] = {TORCHLIN_SHARD(TORCHLIN_FUNCTOR_ROW)};
}
extern const Table TORCHLIN_SHARD_NAME;
const Table TORCHLIN_SHARD_NAME{kFunctors, sizeof kFunctors / sizeof *kFunctors};

}  // namespace torchlin::activation
