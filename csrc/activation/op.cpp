// The activations' raw ops: schemas, and the CPU kernels' operands and threads.
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "activation/loop.h"
#include "activation/table.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "activation/copy_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using activation::Dim;
using activation::Entry;
using activation::Functions;
using activation::Kernel;
using activation::Loop;
using activation::Operand;
using activation::Storage;

constexpr int64_t kUnit = 64;  // elements: work is divided at multiples of it
constexpr int64_t kGrain = 32768;
// Bytes of an output that is written past the caches. Measured here: 0.75 of the time at 32 MiB, 1.2 at 16. Not for fresh
// memory, which the system has just cleared and has in the cache.
constexpr int64_t kStreamed = int64_t{32} << 20;

enum Split : int64_t { kNone, kHalves, kHalvesSwapped, kInterleaved, kInterleavedSwapped };

struct Call {
  int64_t kernel;
  const std::vector<Tensor>& inputs;
  const std::optional<Tensor>& slots;
  const std::vector<int64_t>& lengths;
  int64_t channel_dim = 0, split = kNone, split_dim = 0;
};

Storage storage_of(ScalarType dtype) {
  return dispatch_float(dtype, [](auto tag) {
    using T = typename decltype(tag)::type;
    return std::is_same_v<T, float>    ? activation::kFloat
           : std::is_same_v<T, double> ? activation::kDouble
           : std::is_same_v<T, Half>   ? activation::kHalf
                                       : activation::kBFloat16;
  });
}

const Entry& entry_of(int64_t id) {
  const Entry* entry = activation::find(id);
  TORCHLIN_CHECK(entry != nullptr, "activation: no kernel has id ", id,
                 "; one that was compiled at run time has to be loaded in this process first");
  return *entry;
}

// The best level not above the one in use that has such a kernel.
template <class Pick>
void choose(Loop& loop, const Entry& entry, Pick pick) {
  using PerLevel = std::array<const activation::Copies*, kCpuIsaCount>;
#if defined(__x86_64__)
  static constexpr PerLevel kCopies{baseline::kCopies, avx2::kCopies, avx512::kCopies};
#else
  static constexpr PerLevel kCopies{baseline::kCopies, baseline::kCopies, baseline::kCopies};
#endif
  int level = static_cast<int>(cpu_isa());
  loop.copies = kCopies[level];
  for (; level >= 0; --level) {
    const Functions* functions = entry.levels[level];
    if (functions == nullptr) continue;
    const Kernel* kernels = pick(*functions);
    loop.kernel = kernels[loop.storage == activation::kDouble ? activation::kDouble : activation::kFloat];
    if (loop.storage > activation::kDouble) loop.direct_kernel = kernels[loop.storage];
    if (loop.kernel == nullptr) continue;
    loop.lanes = (int64_t{16} << level) / loop.compute_size();
    return;
  }
  TORCHLIN_CHECK(false, "activation: kernel ", entry.functor.id, " has no code for this CPU");
}

struct Sizes {
  std::array<int64_t, 64> size;
  int64_t ndim, numel = 1;

  explicit Sizes(const Call& call) {
    const auto sizes = call.inputs[0].sizes();
    ndim = static_cast<int64_t>(sizes.size());
    for (int64_t d = 0; d < ndim; ++d) size[d] = sizes[d] / (call.split != kNone && d == call.split_dim ? 2 : 1);
    for (int64_t d = 0; d < ndim; ++d) numel *= size[d];
  }
};

void use_slots(Loop& loop, const activation::Functor& f, const std::optional<Tensor>& slots) {
  TORCHLIN_CHECK((f.slots > 0) == slots.has_value(), "activation: kernel ", f.id, " has ", f.slots, " slots, got ",
                 slots ? "some" : "none");
  if (!slots) return;
  const auto size = slots->sizes();
  const ScalarType dtype = loop.storage == activation::kDouble ? ScalarType::Double : ScalarType::Float;
  TORCHLIN_CHECK(size.size() == 2 && slots->is_contiguous() && slots->scalar_type() == dtype,
                 "activation: slots must be contiguous, of shape (rows, channels), in the compute dtype");
  loop.rows = size[0];
  loop.channels = size[1];
  loop.slots = static_cast<const char*>(slots->data_ptr());
}

// One or, of a packed tensor, two operands.
struct View {
  int operand;
  char* data;
  const int64_t* strides;
  bool doubled;  // every second element along split_dim
};

class Builder {
 public:
  Builder(Loop& loop, const Call& call, const Entry& entry) : loop_(loop), call_(call), sizes_(call) {
    const auto& f = entry.functor;
    const int64_t expected = f.inputs - (call.split != kNone);
    TORCHLIN_CHECK(static_cast<int64_t>(call.inputs.size()) == expected, "activation: kernel ", call.kernel, " takes ",
                   expected, " tensors, got ", call.inputs.size());
    TORCHLIN_CHECK(sizes_.ndim <= 64, "activation: more than 64 dimensions");
    loop.storage = storage_of(call.inputs[0].scalar_type());
    if (call.split != kNone) {
      const int64_t dim = call.split_dim;
      TORCHLIN_CHECK(call.split > 0 && call.split <= kInterleavedSwapped && dim >= 0 && dim < sizes_.ndim &&
                         call.inputs[0].sizes()[dim] % 2 == 0,
                     "activation: a packed tensor cannot be split like this");
    }
    for (const Tensor& x : call.inputs) {
      if (&x != call.inputs.data()) check(x);
    }
    set_slots(f);
  }

  const Sizes& sizes() const { return sizes_; }

  void add(int operand, const Tensor& t, bool packed = false) {
    char* const data = static_cast<char*>(t.data_ptr());
    const int64_t* strides = t.strides().data();
    if (!packed) {
      views_[count_++] = {operand, data, strides, false};
      return;
    }
    const bool interleaved = call_.split >= kInterleaved;
    const int64_t places = interleaved ? 1 : sizes_.size[call_.split_dim];
    const int64_t apart = strides[call_.split_dim] * places * loop_.element_size();
    const bool swapped = call_.split == kHalvesSwapped || call_.split == kInterleavedSwapped;
    views_[count_++] = {operand, data + (swapped ? apart : 0), strides, interleaved};
    views_[count_++] = {operand + 1, data + (swapped ? 0 : apart), strides, interleaved};
  }
  void add_inputs() {
    int operand = activation::kInput;
    for (const Tensor& x : call_.inputs) {
      const bool packed = call_.split != kNone && operand == 0;
      add(operand, x, packed);
      operand += packed ? 2 : 1;
    }
  }
  void check(const Tensor& t) const {
    const auto sizes = t.sizes();
    const bool same_shape = static_cast<int64_t>(sizes.size()) == sizes_.ndim &&
                            std::equal(sizes.begin(), sizes.end(), sizes_.size.begin());
    TORCHLIN_CHECK(same_shape && t.scalar_type() == call_.inputs[0].scalar_type(),
                   "activation: tensors differ in shape or dtype");
  }

  void finish(int lead) {
    for (int i = 0; i < count_; ++i) loop_.use(views_[i].operand, views_[i].data);
    for (int64_t d = 0; d < sizes_.ndim; ++d) {
      Dim dim{sizes_.size[d], {}};
      for (int i = 0; i < count_; ++i) {
        const View& v = views_[i];
        dim.step[v.operand] = v.strides[d] * (v.doubled && d == call_.split_dim ? 2 : 1);
      }
      dim.step[activation::kChannel] = loop_.channels > 1 && d == call_.channel_dim;
      loop_.add_dim(dim);
    }
    loop_.merge(lead);
  }

 private:
  void set_slots(const activation::Functor& f) {
    use_slots(loop_, f, call_.slots);
    if (f.slots == 0) return;
    TORCHLIN_CHECK(static_cast<int>(call_.lengths.size()) == f.slots, "activation: kernel ", call_.kernel, " has ", f.slots,
                   " slots, got ", call_.lengths.size(), " lengths");
    for (int i = 0; i < f.slots; ++i) {
      const int64_t length = call_.lengths[i];
      TORCHLIN_CHECK(f.vectors >> i & 1 ? length > 0 : length == 1, "activation: slot ", i, " has length ", length);
      first_row_[i] = i == 0 ? 0 : first_row_[i - 1] + call_.lengths[i - 1];
    }
    TORCHLIN_CHECK(first_row_[f.slots - 1] + call_.lengths[f.slots - 1] == loop_.rows,
                   "activation: slots do not have the rows of lengths");
    TORCHLIN_CHECK(loop_.channels == 1 || (call_.channel_dim >= 0 && call_.channel_dim < sizes_.ndim &&
                                           sizes_.size[call_.channel_dim] == loop_.channels),
                   "activation: slots of ", loop_.channels, " channels do not fit channel_dim ", call_.channel_dim);
    loop_.first_row = first_row_.data();
    loop_.lengths = call_.lengths.data();
  }

  Loop& loop_;
  const Call& call_;
  Sizes sizes_;
  std::array<View, activation::kOperands> views_;
  int count_ = 0;
  std::array<int64_t, 32> first_row_;
};

void run(const Loop& loop) {
  parallel_for((loop.numel + kUnit - 1) / kUnit, kGrain / kUnit, [&](int64_t begin, int64_t end) {
    loop.run(begin * kUnit, std::min(end * kUnit, loop.numel), nullptr);
  });
}

// Slot gradients: sums over parts of the work that do not depend on the threads, added up in order.
void run_with_sums(const Loop& loop, const Tensor& slot_grads) {
  constexpr int64_t kPartElements = 16384, kParts = 64;
  const int64_t size = loop.rows * loop.channels, units = (loop.numel + kUnit - 1) / kUnit;
  const int64_t parts = std::clamp<int64_t>(loop.numel / std::max(kPartElements, 4 * size), 1, kParts);
  std::vector<double> sums(static_cast<size_t>(parts * size));
  parallel_for(parts, std::max<int64_t>(1, kGrain / (loop.numel / parts + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      loop.run(units * part / parts * kUnit, std::min(units * (part + 1) / parts * kUnit, loop.numel), &sums[part * size]);
    }
  });
  const auto write = [&](auto* out) {
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * size + i];
      out[i] = static_cast<std::remove_reference_t<decltype(*out)>>(total);
    }
  };
  if (loop.storage == activation::kDouble) write(static_cast<double*>(slot_grads.data_ptr()));
  else write(static_cast<float*>(slot_grads.data_ptr()));
}

void forward(const Call& call, const Tensor& out, bool fresh = true) {
  const Entry& entry = entry_of(call.kernel);
  Loop loop;
  Builder builder(loop, call, entry);
  builder.check(out);
  if (builder.sizes().numel == 0) return;
  choose(loop, entry, [](const Functions& f) { return f.forward; });
  builder.add_inputs();
  builder.add(activation::kOutput, out);
  builder.finish(activation::kOutput);
  if (!fresh && loop.numel * loop.element_size() >= kStreamed) {
    loop.stream = true;
    for (int k = 0; k < entry.functor.inputs; ++k) loop.stream &= loop.base[k] != loop.base[activation::kOutput];
  }
  run(loop);
}

std::vector<int64_t> contiguous_strides(const int64_t* sizes, int64_t ndim) {
  std::vector<int64_t> strides(static_cast<size_t>(ndim));
  int64_t step = 1;
  for (int64_t d = ndim; d-- > 0; step *= std::max<int64_t>(sizes[d], 1)) strides[d] = step;
  return strides;
}

Tensor activation_fwd(const std::vector<Tensor>& inputs, int64_t kernel, const std::optional<Tensor>& slots,
                      const std::vector<int64_t>& lengths, int64_t channel_dim, int64_t split, int64_t split_dim) {
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  const Call call{kernel, inputs, slots, lengths, channel_dim, split, split_dim};
  if (split == kNone) {
    Tensor out = empty_like(inputs[0]);
    forward(call, out);
    return out;
  }
  TORCHLIN_CHECK(split_dim >= 0 && split_dim < inputs[0].dim(), "activation: split_dim ", split_dim, " is out of range");
  const Sizes sizes(call);
  const std::vector<int64_t> strides = contiguous_strides(sizes.size.data(), sizes.ndim);
  Tensor out = empty_strided(inputs[0], sizes.ndim, sizes.size.data(), strides.data());
  forward(call, out);
  return out;
}

// The plainest call: one tensor, one value a slot. For a small tensor what is looked up and allocated is most of the time.
Tensor activation_plain(const Tensor& x, int64_t kernel, const std::optional<Tensor>& slots) {
  constexpr int kMaxSlots = 8;
  static constexpr int64_t kRows[kMaxSlots] = {0, 1, 2, 3, 4, 5, 6, 7}, kOnes[kMaxSlots] = {1, 1, 1, 1, 1, 1, 1, 1};
  Tensor out = empty_like(x);
  const Entry& entry = entry_of(kernel);
  const activation::Functor& f = entry.functor;
  Loop loop;
  if (x.is_contiguous() && f.inputs == 1 && f.vectors == 0 && f.slots <= kMaxSlots) {
    loop.storage = storage_of(x.scalar_type());
    use_slots(loop, f, slots);
    if (loop.rows == f.slots && loop.channels == 1) {
      loop.numel = x.numel();
      if (loop.numel == 0) return out;
      choose(loop, entry, [](const Functions& functions) { return functions.forward; });
      loop.first_row = kRows;
      loop.lengths = kOnes;
      loop.use(activation::kInput, x.data_ptr());
      loop.use(activation::kOutput, out.data_ptr());
      loop.ndim = 1;
      loop.dims[0] = Dim{loop.numel, {1, 1, 1, 1, 1, 1, 1, 0}};
      run(loop);
      return out;
    }
  }
  const std::vector<Tensor> inputs{x};
  const std::vector<int64_t> lengths(slots ? static_cast<size_t>(slots->sizes()[0]) : 0, 1);
  forward({kernel, inputs, slots, lengths}, out);
  return out;
}

void activation_out(const std::vector<Tensor>& inputs, int64_t kernel, const std::optional<Tensor>& slots,
                    const std::vector<int64_t>& lengths, int64_t channel_dim, int64_t split, int64_t split_dim, Tensor out) {
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  forward({kernel, inputs, slots, lengths, channel_dim, split, split_dim}, out, false);
}

std::vector<Tensor> activation_bwd(const Tensor& grad, const std::vector<Tensor>& inputs, int64_t kernel,
                                   const std::optional<Tensor>& slots, const std::vector<int64_t>& lengths,
                                   int64_t channel_dim, int64_t split, int64_t split_dim, int64_t needs) {
  constexpr int64_t kNeedsSlots = 8;
  TORCHLIN_CHECK(!inputs.empty(), "activation: no inputs");
  const Call call{kernel, inputs, slots, lengths, channel_dim, split, split_dim};
  const Entry& entry = entry_of(kernel);
  Loop loop;
  Builder builder(loop, call, entry);
  builder.check(grad);

  std::vector<Tensor> grads;
  int lead = activation::kInput, operand = activation::kOutput;
  builder.add_inputs();
  builder.add(activation::kGrad, grad);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool packed = split != kNone && i == 0;
    if (needs >> i & 1) {
      grads.push_back(empty_like(inputs[i]));
      builder.add(operand, grads.back(), packed);
      if (lead < activation::kOutput) lead = operand;
    }
    operand += packed ? 2 : 1;
  }
  const bool by_slots = (needs & kNeedsSlots) != 0;
  if (by_slots) {
    TORCHLIN_CHECK(slots.has_value(), "activation: gradients of slots that are not there");
    grads.push_back(empty_like(*slots));
  }
  if (grads.empty()) return grads;
  if (builder.sizes().numel == 0) {
    if (by_slots) std::memset(grads.back().data_ptr(), 0, static_cast<size_t>(slots->numel() * slots->element_size()));
    return grads;
  }
  choose(loop, entry, [&](const Functions& f) { return by_slots ? f.backward_slots : f.backward; });
  builder.finish(lead);
  if (by_slots) run_with_sums(loop, grads.back());
  else run(loop);
  return grads;
}

std::vector<int64_t> activation_load(std::string path) {
  std::string problem;
  std::vector<int64_t> ids = activation::load(path, problem);
  TORCHLIN_CHECK(problem.empty(), "activation: ", problem);
  return ids;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_activation(Tensor x, int kernel, Tensor? slots=None) -> Tensor");
  m.def(
      "_activation_fwd(Tensor[] inputs, int kernel, Tensor? slots, int[] lengths, int channel_dim, int split, int split_dim) "
      "-> Tensor");
  m.def(
      "_activation_out(Tensor[] inputs, int kernel, Tensor? slots, int[] lengths, int channel_dim, int split, int split_dim, "
      "Tensor(a!) out) -> ()");
  m.def(
      "_activation_bwd(Tensor grad, Tensor[] inputs, int kernel, Tensor? slots, int[] lengths, int channel_dim, int split, int "
      "split_dim, int needs) -> Tensor[]");
  m.def("_activation_load(str path) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_activation", torchlin::activation_plain);
  TORCHLIN_IMPL(m, "_activation_fwd", torchlin::activation_fwd);
  TORCHLIN_IMPL(m, "_activation_out", torchlin::activation_out);
  TORCHLIN_IMPL(m, "_activation_bwd", torchlin::activation_bwd);
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CompositeExplicitAutograd, m) {
  TORCHLIN_IMPL(m, "_activation_load", torchlin::activation_load);
}
