#include "activation/load.h"

#include <cuda_runtime.h>

#include <mutex>
#include <string>
#include <unordered_map>

#include "core/cuda.h"
#include "core/op.h"

namespace torchlin {
namespace activation {
namespace {

struct Loaded {
  std::mutex mutex;
  std::unordered_map<int64_t, Functor> functors;  // whose addresses stay

  static Loaded& all() {
    static auto* const loaded = new Loaded;
    return *loaded;
  }
};

template <class Kernel>
void find(Kernel& kernel, cudaLibrary_t library, const char* name) {
  cudaKernel_t handle = nullptr;
  TORCHLIN_CUDA_CHECK(cudaLibraryGetKernel(&handle, library, name));
  kernel = reinterpret_cast<Kernel>(handle);
}

}  // namespace

const Functor* loaded(int64_t id) {
  Loaded& all = Loaded::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.functors.find(id);
  return found == all.functors.end() ? nullptr : &found->second;
}

}  // namespace activation

namespace {

// `code`: the bytes of a module, or of PTX, that has torchlin_forward, torchlin_backward and, with slots, torchlin_backward_slots.
void activation_load_cuda(Tensor code, int64_t id, int64_t inputs, int64_t slots, int64_t vectors) {
  using namespace activation;
  cudaLibrary_t library = nullptr;
  TORCHLIN_CUDA_CHECK(cudaLibraryLoadData(&library, code.const_data_ptr(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  Functor functor{};
  functor.id = static_cast<int>(id);
  functor.inputs = static_cast<int>(inputs);
  functor.slots = static_cast<int>(slots);
  functor.vectors = static_cast<unsigned>(vectors);
  find(functor.forward, library, "torchlin_forward");
  find(functor.backward, library, "torchlin_backward");
  if (slots > 0) find(functor.backward_slots, library, "torchlin_backward_slots");
  Loaded& all = Loaded::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.functors.emplace(id, functor);
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_activation_load_cuda(Tensor code, int kernel, int inputs, int slots, int vectors) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torchlin, CompositeExplicitAutograd, m) {
  TORCHLIN_IMPL(m, "_activation_load_cuda", torchlin::activation_load_cuda);
}
