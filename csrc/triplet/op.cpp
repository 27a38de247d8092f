// sample_triplet's raw ops: schemas, and the CPU kernels' threads and choice of level.
#include <array>
#include <initializer_list>
#include <tuple>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "simd/cpu_isa.h"
#include "triplet/setup.h"

#define TORCHLIN_KERNEL "triplet/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using triplet::Job;
using triplet::kChunk;
using triplet::Setup;

const triplet::Kernel& triplet_kernel(ScalarType dtype) {
#if defined(__x86_64__)
  static constexpr std::array<const triplet::Kernel*, kCpuIsaCount> kLevels{baseline::kKernels, avx2::kKernels, avx512::kKernels};
  const triplet::Kernel* kernels = kLevels[static_cast<int>(cpu_isa())];
#else
  const triplet::Kernel* kernels = baseline::kKernels;
#endif
  return dispatch_float(dtype, [&](auto tag) -> const triplet::Kernel& {
    using T = typename decltype(tag)::type;
    return kernels[std::is_same_v<T, float> ? 0 : std::is_same_v<T, double> ? 1 : std::is_same_v<T, Half> ? 2 : 3];
  });
}

template <class F>
void for_units(const Job& job, const F& f) {
  constexpr int64_t kGrain = 16384;  // elements worth a thread
  const int64_t unit = 2 * std::max<int64_t>(1, std::min(job.size, kChunk));
  parallel_for(job.pairs() * job.chunks(), std::max<int64_t>(1, kGrain / unit), f);
}

// What belongs to a call on the CPU beyond its tensors: every sample's mix and radii.
struct CpuCall {
  Setup setup;
  Tensor mix;
  std::vector<double> radius;
  double eps;
  float eps_float;

  CpuCall(const Tensor& x, double eps_all, const std::optional<Tensor>& eps_at, const Tensor& seed, bool ball,
          std::optional<double> low, std::optional<double> high)
      : setup(x, eps_at, ball, low, high), mix(empty_mix(x)), eps(eps_all), eps_float(static_cast<float>(eps_all)) {
    Job& job = setup.job;
    const bool wide = x.scalar_type() == ScalarType::Double;
    if (!eps_at) job.eps = wide ? static_cast<const void*>(&eps) : &eps_float;
    TORCHLIN_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "triplet: seed must be one int64");
    job.keys = triplet::Keys(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())));
    job.mix = mix.mutable_data_ptr();
    std::vector<int64_t> lengths;
    if (ball && job.size > 0) {
      lengths.resize(static_cast<size_t>(2 * job.batch));
      radius.resize(lengths.size());
      job.radius = radius.data();
      const triplet::Kernel& kernel = triplet_kernel(x.scalar_type());
      for_units(job, [&](int64_t begin, int64_t end) { kernel.lengths(job, begin, end, lengths.data()); });
    }
    for (int64_t i = 0; i < job.batch; ++i) {
      const triplet::Words words = triplet::philox(static_cast<uint64_t>(i), 0, triplet::kSample, job.keys);
      const float alpha = triplet::mix_of(words.w[0]);
      if (wide) static_cast<double*>(mix.mutable_data_ptr())[i] = alpha;
      else static_cast<float*>(mix.mutable_data_ptr())[i] = alpha;
      for (int64_t k = 0; k < 2 && !radius.empty(); ++k) {
        radius[k * job.batch + i] = triplet::radius_of(lengths[k * job.batch + i], job.bits, words.w[k + 1], job.size);
      }
    }
  }

  static Tensor empty_mix(const Tensor& x) {
    const int64_t size = x.sizes()[0], stride = 1;
    const bool wide = x.scalar_type() == ScalarType::Double;
    return empty_strided(x, 1, &size, &stride, static_cast<int32_t>(wide ? ScalarType::Double : ScalarType::Float));
  }
};

std::tuple<Tensor, Tensor> triplet_fwd(const Tensor& x, double eps, const std::optional<Tensor>& eps_at, const Tensor& seed,
                                       bool ball, std::optional<double> low, std::optional<double> high) {
  CpuCall call(x, eps, eps_at, seed, ball, low, high);
  Job& job = call.setup.job;
  Tensor out = triplet::empty_batch(x, 3 * job.batch, call.setup.strides);
  job.out = out.mutable_data_ptr();
  const triplet::Kernel& kernel = triplet_kernel(x.scalar_type());
  const auto forward = kernel.forward[job.clip];
  for_units(job, [&](int64_t begin, int64_t end) { forward(job, begin, end); });
  return {std::move(out), std::move(call.mix)};
}

Tensor triplet_bwd(const Tensor& grad, const Tensor& x, double eps, const std::optional<Tensor>& eps_at, const Tensor& seed,
                   bool ball, double low, double high) {
  TORCHLIN_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == 3 * x.numel(), "triplet: grad does not fit x");
  CpuCall call(x, eps, eps_at, seed, ball, low, high);
  Job& job = call.setup.job;
  const Tensor slopes = triplet::with_strides(grad, call.setup.strides, true);
  Tensor dx = triplet::empty_batch(x, job.batch, call.setup.strides);
  job.grad = slopes.const_data_ptr(), job.out = dx.mutable_data_ptr();
  const triplet::Kernel& kernel = triplet_kernel(x.scalar_type());
  for_units(job, [&](int64_t begin, int64_t end) { kernel.backward(job, begin, end); });
  return dx;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def(
      "_triplet_fwd(Tensor x, float eps, Tensor? eps_at, Tensor seed, bool ball, float? low, float? high) -> (Tensor, Tensor)");
  m.def(
      "_triplet_bwd(Tensor grad, Tensor x, float eps, Tensor? eps_at, Tensor seed, bool ball, float low, float high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_triplet_fwd", torchlin::triplet_fwd);
  TORCHLIN_IMPL(m, "_triplet_bwd", torchlin::triplet_bwd);
}
