// The three-point loss's raw ops: schemas, and the CPU kernel's threads and choice of level.
#include <array>
#include <limits>
#include <memory>
#include <tuple>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "linearity/args.h"
#include "linearity/job.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "linearity/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using linearity::Arguments;
using linearity::Job;
using linearity::OptionalTensor;
using linearity::Reduction;
using linearity::Scratch;

const linearity::Kernel& kernel_for(bool wide) {
#if defined(__x86_64__)
  static constexpr std::array<const linearity::Kernel*, kCpuIsaCount> kLevels{baseline::kKernels, avx2::kKernels,
                                                                              avx512::kKernels};
  const linearity::Kernel* kernels = kLevels[static_cast<int>(cpu_isa())];
#else
  const linearity::Kernel* kernels = baseline::kKernels;
#endif
  return kernels[wide ? 1 : 0];
}

constexpr int64_t kGrain = 65536;  // logits worth a thread

bool is_class(int64_t label, const Job& job) {
  return label == job.ignore_index || (label >= 0 && label < job.classes);
}

template <class C>
bool mixes_are_shares(const Job& job) {
  const C* mix = static_cast<const C*>(job.mix);
  bool fine = true;
  for (int64_t i = 0; i < (job.mix_step == 0 ? 1 : job.samples); ++i) fine &= !(mix[i] < 0 || mix[i] > 1);  // NaN is let through
  return fine;
}

// Values that no kernel may meet. Returns the number of samples that count.
int64_t check_values(const Job& job, bool wide) {
  TORCHLIN_CHECK(wide ? mixes_are_shares<double>(job) : mixes_are_shares<float>(job), "linearity: mix outside of [0, 1]");
  if (job.labels == nullptr) return job.samples;
  int64_t counted = 0;
  for (int64_t i = 0; i < job.samples; ++i) {
    const int64_t first = job.labels[i], second = job.others == nullptr ? first : job.others[i];
    TORCHLIN_CHECK(is_class(first, job) && is_class(second, job), "linearity: a class number out of range");
    counted += first != job.ignore_index && second != job.ignore_index;
  }
  return counted;
}

// Runs the job; writes the reduced value if that is wanted.
void run(Arguments& arguments, const Tensor* value) {
  Job& job = arguments.job;
  const bool wide = arguments.element() == 8;
  const linearity::Kernel& kernel = kernel_for(wide);
  const int64_t counted = check_values(job, wide);
  if (arguments.reduction == Reduction::mean) job.scale = 1 / static_cast<double>(counted);
  const std::unique_ptr<double[]> penalties(value != nullptr ? new double[static_cast<size_t>(job.samples)] : nullptr);
  job.penalties = penalties.get();
  const int64_t grain = std::max<int64_t>(1, kGrain / (3 * job.classes));
  parallel_for(job.samples, grain, [&](int64_t begin, int64_t end) {
    kernel.run(job, begin, end);
    Scratch::trim();
  });
  if (value == nullptr) return;
  const auto write = [&](auto* out) {
    using C = std::remove_pointer_t<decltype(out)>;
    if (arguments.reduction == Reduction::none) {
      for (int64_t i = 0; i < job.samples; ++i) out[i] = static_cast<C>(job.penalties[i]);
      return;
    }
    double sum = 0;  // always in this order
    for (int64_t i = 0; i < job.samples; ++i) sum += job.penalties[i];
    out[0] = static_cast<C>(arguments.reduction == Reduction::sum ? sum : sum / static_cast<double>(counted));
  };
  if (wide) write(static_cast<double*>(value->mutable_data_ptr()));
  else write(static_cast<float*>(value->mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> linearity_fwd(TORCHLIN_LINEARITY_PARAMETERS) {
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  Tensor value = arguments.value(), losses = arguments.losses();
  arguments.job.losses = losses.mutable_data_ptr();
  run(arguments, &value);
  return {value, losses};
}

std::tuple<Tensor, Tensor, Tensor> linearity_fwd_grad(TORCHLIN_LINEARITY_PARAMETERS) {
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  Tensor value = arguments.value(), dlogits = arguments.dlogits(), dmix = arguments.dmix();
  arguments.job.dlogits = dlogits.mutable_data_ptr();
  arguments.job.dmix = dmix.mutable_data_ptr();
  run(arguments, &value);
  return {value, dlogits, dmix};
}

std::tuple<Tensor, Tensor> linearity_bwd(const OptionalTensor& grad_value, const OptionalTensor& grad_losses,
                                         TORCHLIN_LINEARITY_PARAMETERS) {
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  arguments.set_gradients(grad_value, grad_losses);
  Tensor dlogits = arguments.dlogits(), dmix = arguments.dmix();
  arguments.job.dlogits = dlogits.mutable_data_ptr();
  arguments.job.dmix = dmix.mutable_data_ptr();
  run(arguments, nullptr);
  return {dlogits, dmix};
}

void linearity_scale(Tensor rows, const Tensor& by) {
  linearity::check_scale(rows, by);
  const int64_t samples = rows.size(0) / 3, width = rows.size(1);
  const linearity::Kernel& kernel = kernel_for(rows.scalar_type() == ScalarType::Double);
  const int64_t step = by.dim() == 0 ? 0 : by.stride(0);
  const void* factor = by.const_data_ptr();
  void* data = rows.mutable_data_ptr();
  parallel_for(rows.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)),
               [&](int64_t begin, int64_t end) { kernel.scale(data, width, factor, step, samples, begin, end); });
}

}  // namespace
}  // namespace torchlin

// a alone is (3B, K), with b and c (B, K); target is class numbers (B,) or probabilities (B, K).
#define TORCHLIN_LINEARITY_SCHEMA                                                                                        \
  "Tensor a, Tensor target, Tensor mix, Tensor? b=None, Tensor? c=None, Tensor? others=None, Tensor? lam=None, "           \
  "Tensor? weight=None, float smoothing=0, int ignore_index=-100, int penalty=0, float beta=1, int reduction=1"

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_linearity_fwd(" TORCHLIN_LINEARITY_SCHEMA ") -> (Tensor, Tensor)");
  m.def("_linearity_fwd_grad(" TORCHLIN_LINEARITY_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("_linearity_bwd(Tensor? grad_value, Tensor? grad_losses, " TORCHLIN_LINEARITY_SCHEMA ") -> (Tensor, Tensor)");
  m.def("_linearity_scale_(Tensor(a!) rows, Tensor by) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_linearity_fwd", torchlin::linearity_fwd);
  TORCHLIN_IMPL(m, "_linearity_fwd_grad", torchlin::linearity_fwd_grad);
  TORCHLIN_IMPL(m, "_linearity_bwd", torchlin::linearity_bwd);
  TORCHLIN_IMPL(m, "_linearity_scale_", torchlin::linearity_scale);
}
