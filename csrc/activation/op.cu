// The activations' raw ops on CUDA: checks, allocation and launches. Schemas are in op.cpp. float64 has no kernels here: Python
// runs the reference for it.
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <vector>

#include "activation/kernels.inc"
#include "activation/launch.h"
#include "activation/load.h"
#include "core/op.h"
#include "core/tensor.h"
#include "gpu/launch.h"

namespace torchlin {
namespace activation {
#define DECLARE(shard) extern const Table shard;
TORCHLIN_SHARDS(DECLARE)
#undef DECLARE
}  // namespace activation

namespace {

using activation::Call;
using activation::Functor;
using activation::Plan;

const Functor& functor_of(int64_t id) {
  static const auto* const all = [] {
    auto* table = new std::unordered_map<int64_t, const Functor*>;
#define ADD(shard) \
  for (int i = 0; i < activation::shard.count; ++i) table->emplace(activation::shard.functors[i].id, &activation::shard.functors[i]);
    TORCHLIN_SHARDS(ADD)
#undef ADD
    return table;
  }();
  const auto found = all->find(id);
  const Functor* functor = found != all->end() ? found->second : activation::loaded(id);
  TORCHLIN_CHECK(functor != nullptr, "activation: no CUDA kernel has id ", id);
  return *functor;
}

activation::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return activation::kFloat32;
    case ScalarType::Half: return activation::kFloat16;
    case ScalarType::BFloat16: return activation::kBFloat16;
    default: TORCHLIN_CHECK(false, "activation: on CUDA expected float32, float16 or bfloat16; float64 is for the reference");
  }
#if defined(__GNUC__)
  __builtin_unreachable();
#endif
}

activation::View view(const Tensor& t) { return {static_cast<char*>(t.data_ptr()), t.strides().data()}; }

// A call of the raw ops, checked.
struct Request {
  const Functor& functor;
  const std::vector<Tensor>& inputs;
  Call call;

  Request(const std::vector<Tensor>& tensors, int64_t kernel, const std::optional<Tensor>& slots,
          const std::vector<int64_t>& lengths, int64_t channel_dim, int64_t split, int64_t split_dim)
      : functor(functor_of(kernel)), inputs(tensors) {
    const bool packed = split != activation::kNone;
    const int64_t expected = functor.inputs - packed;
    TORCHLIN_CHECK(static_cast<int64_t>(tensors.size()) == expected, "activation: kernel ", kernel, " takes ", expected,
                   " tensors, got ", tensors.size());
    call.type = type_of(tensors[0]);
    call.inputs = functor.inputs, call.slots = functor.slots;
    const auto sizes = tensors[0].sizes();
    call.sizes.assign(sizes.begin(), sizes.end());
    if (packed) {
      TORCHLIN_CHECK(split > 0 && split <= activation::kInterleavedSwapped && split_dim >= 0 && split_dim < tensors[0].dim() &&
                         call.sizes[split_dim] % 2 == 0,
                     "activation: a packed tensor cannot be split like this");
      call.sizes[split_dim] /= 2;
    }
    call.split = split, call.split_dim = split_dim;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i > 0) check(tensors[i]);
      call.in[i] = view(tensors[i]);
    }
    if (functor.slots > 0) set_slots(kernel, slots, lengths, channel_dim);
    else TORCHLIN_CHECK(!slots, "activation: kernel ", kernel, " has no slots");
  }

  void check(const Tensor& t) const {
    const auto sizes = t.sizes();
    TORCHLIN_CHECK(std::equal(sizes.begin(), sizes.end(), call.sizes.begin(), call.sizes.end()) &&
                       t.scalar_type() == inputs[0].scalar_type() && t.get_device_index() == inputs[0].get_device_index(),
                   "activation: tensors differ in shape, dtype or device");
  }

  void set_slots(int64_t kernel, const std::optional<Tensor>& slots, const std::vector<int64_t>& lengths, int64_t channel_dim) {
    TORCHLIN_CHECK(slots && slots->dim() == 2 && slots->is_contiguous() && slots->scalar_type() == ScalarType::Float &&
                       slots->get_device_index() == inputs[0].get_device_index(),
                   "activation: slots must be a contiguous float32 tensor of shape (rows, channels) on the device of the inputs");
    TORCHLIN_CHECK(static_cast<int>(lengths.size()) == functor.slots, "activation: kernel ", kernel, " has ", functor.slots,
                   " slots, got ", lengths.size(), " lengths");
    int64_t rows = 0;
    for (int i = 0; i < functor.slots; ++i) {
      TORCHLIN_CHECK(functor.vectors >> i & 1 ? lengths[i] > 0 : lengths[i] == 1, "activation: slot ", i, " has length ", lengths[i]);
      rows += lengths[i];
    }
    const int64_t channels = slots->size(1);
    TORCHLIN_CHECK(rows == slots->size(0), "activation: slots do not have the rows of lengths");
    TORCHLIN_CHECK(channels == 1 || (channel_dim >= 0 && channel_dim < static_cast<int64_t>(call.sizes.size()) &&
                                     call.sizes[channel_dim] == channels),
                   "activation: slots of ", channels, " channels do not fit channel_dim ", channel_dim);
    call.slot_values = static_cast<const float*>(slots->const_data_ptr());
    call.lengths = lengths, call.channels = channels, call.channel_dim = channel_dim;
  }

  // The stream is the one that torch has made current on the device of the inputs, which has to be current too.
  void run() const {
    const Tensor& x = inputs[0];
    const cudaStream_t stream = current_stream(x);
    const Plan plan = activation::make_plan(call, gpu::kDefaultSharedBytes);
    // Freed on return, when the kernels may not have run: the caching allocator hands it out again in stream order only.
    std::optional<Tensor> sums;
    if (plan.sums > 0) {
      const int64_t stride = 1;
      sums = empty_strided(x, 1, &plan.sums, &stride, aoti_torch_dtype_float64());
      if (plan.launches.size() > 1) {
        TORCHLIN_CUDA_CHECK(cudaMemsetAsync(sums->data_ptr(), 0, static_cast<size_t>(plan.sums) * sizeof(double), stream));
      }
    }
    activation::run_plan(plan, functor, call.gradient, sums ? static_cast<double*>(sums->data_ptr()) : nullptr,
                         [&](auto kernel, unsigned grid_x, unsigned grid_y, size_t shared_bytes, const auto& arguments) {
                           gpu::launch(stream, kernel, dim3(grid_x, grid_y), activation::kThreads, shared_bytes, arguments);
                         });
  }
};

void forward(Request& request, const Tensor& out) {
  request.check(out);
  request.call.gradient = false;
  request.call.out[0] = view(out);
  request.run();
}

Tensor activation_fwd(const std::vector<Tensor>& inputs, int64_t kernel, const std::optional<Tensor>& slots,
                      const std::vector<int64_t>& lengths, int64_t channel_dim, int64_t split, int64_t split_dim) {
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  const DeviceGuard guard(inputs[0].get_device_index());
  Request request(inputs, kernel, slots, lengths, channel_dim, split, split_dim);
  const auto& sizes = request.call.sizes;
  const auto make = [&] {
    if (split == activation::kNone) return empty_like(inputs[0]);
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(sizes[d], 1)) strides[d] = step;
    return empty_strided(inputs[0], static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
  };
  Tensor out = make();
  forward(request, out);
  return out;
}

Tensor activation_plain(const Tensor& x, int64_t kernel, const std::optional<Tensor>& slots) {
  const DeviceGuard guard(x.get_device_index());
  const std::vector<Tensor> inputs{x};
  const std::vector<int64_t> lengths(slots ? static_cast<size_t>(slots->size(0)) : 0, 1);
  Request request(inputs, kernel, slots, lengths, 0, activation::kNone, 0);
  Tensor out = empty_like(x);
  forward(request, out);
  return out;
}

void activation_out(const std::vector<Tensor>& inputs, int64_t kernel, const std::optional<Tensor>& slots,
                    const std::vector<int64_t>& lengths, int64_t channel_dim, int64_t split, int64_t split_dim, Tensor out) {
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  const DeviceGuard guard(inputs[0].get_device_index());
  Request request(inputs, kernel, slots, lengths, channel_dim, split, split_dim);
  forward(request, out);
}

std::vector<Tensor> activation_bwd(const Tensor& grad, const std::vector<Tensor>& inputs, int64_t kernel,
                                   const std::optional<Tensor>& slots, const std::vector<int64_t>& lengths, int64_t channel_dim,
                                   int64_t split, int64_t split_dim, int64_t needs) {
  constexpr int64_t kNeedsSlots = 8;
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  const DeviceGuard guard(inputs[0].get_device_index());
  Request request(inputs, kernel, slots, lengths, channel_dim, split, split_dim);
  request.check(grad);
  Call& call = request.call;
  call.gradient = true;
  call.grad = view(grad);
  std::vector<Tensor> grads;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!(needs >> i & 1)) continue;
    grads.push_back(empty_like(inputs[i]));
    call.out[i] = view(grads.back());
  }
  if (needs & kNeedsSlots) {
    TORCHLIN_CHECK(slots.has_value(), "activation: gradients of slots that are not there");
    grads.push_back(empty_like(*slots));
    call.slot_grads = static_cast<float*>(grads.back().data_ptr());
    if (inputs[0].numel() == 0) {
      TORCHLIN_CUDA_CHECK(cudaMemsetAsync(call.slot_grads, 0, static_cast<size_t>(slots->numel()) * sizeof(float),
                                          current_stream(inputs[0])));
    }
  }
  if (!grads.empty()) request.run();
  return grads;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_activation", torchlin::activation_plain);
  TORCHLIN_IMPL(m, "_activation_fwd", torchlin::activation_fwd);
  TORCHLIN_IMPL(m, "_activation_out", torchlin::activation_out);
  TORCHLIN_IMPL(m, "_activation_bwd", torchlin::activation_bwd);
}
