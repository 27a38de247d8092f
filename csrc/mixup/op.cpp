// The raw ops of mixup and cutmix: schemas, and the CPU kernels' threads and choice of level.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "mixup/setup.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "mixup/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using mixup::Cut;
using mixup::Mix;

constexpr int64_t kGrain = 32768;  // elements worth a thread

const mixup::Kernel& mixup_kernel(ScalarType dtype) {
#if defined(__x86_64__)
  static constexpr std::array<const mixup::Kernel*, kCpuIsaCount> kLevels{baseline::kKernels, avx2::kKernels, avx512::kKernels};
  const mixup::Kernel* kernels = kLevels[static_cast<int>(cpu_isa())];
#else
  const mixup::Kernel* kernels = baseline::kKernels;
#endif
  return dispatch_float(dtype, [&](auto tag) -> const mixup::Kernel& {
    using T = typename decltype(tag)::type;
    return kernels[std::is_same_v<T, float> ? 0 : std::is_same_v<T, double> ? 1 : std::is_same_v<T, Half> ? 2 : 3];
  });
}

const int64_t* partners_of(const Tensor& perm, int64_t batch) {
  mixup::check_partners(perm, batch);
  const int64_t* partner = static_cast<const int64_t*>(perm.const_data_ptr());
  for (int64_t i = 0; i < batch; ++i) {
    TORCHLIN_CHECK(partner[i] >= 0 && partner[i] < batch, "perm must hold indices into the batch of ", batch, ", got ", partner[i],
                   " at ", i);
  }
  return partner;
}

// head and next of job.h.
struct Lists {
  std::vector<int64_t> head, next;
  Lists(const int64_t* partner, int64_t batch) : head(static_cast<size_t>(batch), -1), next(static_cast<size_t>(batch)) {
    for (int64_t i = batch; i-- > 0;) next[i] = head[partner[i]], head[partner[i]] = i;
  }
};

// A job, the tensors it points to, and the weights of the compute type.
struct MixCall {
  Mix mix;
  Tensor x;
  std::vector<double> rest;
  double one[2];

  MixCall(const Tensor& given, const Tensor& out, double lam, const std::optional<Tensor>& lams, const Tensor& perm)
      : mix(mixup::mix_of(out)), x(in_layout_of(given, out)) {
    mix.x = x.const_data_ptr();
    mix.partner = partners_of(perm, mix.batch);
    if (given.scalar_type() == ScalarType::Double) set<double>(lam, lams);
    else set<float>(lam, lams);
  }

  template <class C>
  void set(double lam, const std::optional<Tensor>& lams) {
    static_assert(sizeof(C) <= sizeof(double));
    if (!lams) {
      const C pair[] = {static_cast<C>(lam), static_cast<C>(1 - lam)};
      std::memcpy(one, pair, sizeof pair);
      mix.lam = one, mix.rest = reinterpret_cast<const C*>(one) + 1, mix.lam_step = 0;
      return;
    }
    TORCHLIN_CHECK(lams->numel() == mix.batch && lams->is_contiguous(), "mixup: lam does not fit x");
    const C* weights = static_cast<const C*>(lams->const_data_ptr());
    rest.resize(static_cast<size_t>(mix.batch));
    C* complements = reinterpret_cast<C*>(rest.data());
    for (int64_t i = 0; i < mix.batch; ++i) complements[i] = 1 - weights[i];
    mix.lam = weights, mix.rest = complements, mix.lam_step = 1;
  }
};

// Neighbours of a sample that are worked on at once: those of the whole batch stay in the second cache, so that a partner is not
// read from memory again.
int64_t chunk_of(const Mix& mix, int64_t element) {
  constexpr int64_t kCache = 512 << 10, kLeast = 256;
  return std::max(kLeast, kCache / element / std::max<int64_t>(1, mix.batch));
}

template <class F>
void for_chunks(const Mix& mix, int64_t element, const F& kernel) {
  constexpr int64_t kSamples = 64;
  const int64_t chunk = std::min(mix.inner, chunk_of(mix, element)), chunks = (mix.inner + chunk - 1) / chunk;
  const int64_t groups = (mix.batch + kSamples - 1) / kSamples, unit = chunk * std::min(kSamples, mix.batch);
  parallel_for(mix.outer * chunks * groups, std::max<int64_t>(1, kGrain / unit), [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t group = u % groups, piece = u / groups, from = piece % chunks * chunk;
      kernel(mix, piece / chunks, from, std::min(from + chunk, mix.inner), group * kSamples,
             std::min((group + 1) * kSamples, mix.batch));
    }
  });
}

int64_t element_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

Tensor mixup_fwd(const Tensor& x, double lam, const std::optional<Tensor>& lams, const Tensor& perm) {
  Tensor out = empty_like(x);
  if (x.numel() == 0) return out;
  MixCall call(x, out, lam, lams, perm);
  call.mix.out = out.mutable_data_ptr();
  for_chunks(call.mix, element_of(x.scalar_type()), mixup_kernel(x.scalar_type()).forward);
  return out;
}

Tensor mixup_bwd(const Tensor& grad, double lam, const std::optional<Tensor>& lams, const Tensor& perm) {
  Tensor dx = empty_like(grad);
  if (grad.numel() == 0) return dx;
  MixCall call(grad, dx, lam, lams, perm);
  const Lists lists(call.mix.partner, call.mix.batch);
  call.mix.head = lists.head.data(), call.mix.next = lists.next.data();
  call.mix.out = dx.mutable_data_ptr();
  for_chunks(call.mix, element_of(grad.scalar_type()), mixup_kernel(grad.scalar_type()).backward);
  return dx;
}

// <grad_i, x_i - x_partner(i)> for every sample: parts of the sample are summed apart, the same ones for any number of threads.
Tensor mixup_lam_bwd(const Tensor& grad, const Tensor& x, const Tensor& perm) {
  TORCHLIN_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && x.dim() > 0, "mixup: grad does not fit x");
  const int64_t batch = x.sizes()[0], stride = 1;
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor out = empty_strided(x, 1, &batch, &stride, static_cast<int32_t>(wide ? ScalarType::Double : ScalarType::Float));
  std::vector<double> totals(static_cast<size_t>(batch));
  if (x.numel() > 0) {
    const Tensor like = is_nonoverlapping_and_dense(x) ? x : empty_like(x);
    const Tensor own = in_layout_of(x, like), slopes = in_layout_of(grad, like);
    Mix mix = mixup::mix_of(like);
    mix.x = slopes.const_data_ptr(), mix.other = own.const_data_ptr(), mix.partner = partners_of(perm, batch);
    constexpr int64_t kParts = 64;
    const mixup::Kernel& kernel = mixup_kernel(x.scalar_type());
    const int64_t longest = 4096;  // what is summed in the compute type
    const int64_t chunk = std::min({mix.inner, longest, chunk_of(mix, element_of(x.scalar_type()))});
    const int64_t chunks = (mix.inner + chunk - 1) / chunk, units = mix.outer * chunks, parts = std::min(units, kParts);
    std::vector<double> sums(static_cast<size_t>(parts * batch));
    parallel_for(parts, std::max<int64_t>(1, kGrain / (x.numel() / parts + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t u = units * part / parts; u < units * (part + 1) / parts; ++u) {
          const int64_t from = u % chunks * chunk;
          kernel.lam_backward(mix, u / chunks, from, std::min(from + chunk, mix.inner), &sums[part * batch]);
        }
      }
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < batch; ++i) totals[i] += sums[part * batch + i];
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (wide) static_cast<double*>(out.mutable_data_ptr())[i] = totals[i];
    else static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(totals[i]);
  }
  return out;
}

// Bytes are moved, no number is looked at: the plane of the sample, and over it the rows of the box.
Tensor cutmix_fwd(const Tensor& x, const Tensor& perm, const Tensor& boxes) {
  const int64_t element = element_of(x.scalar_type());
  return mixup::run_cut(x, perm, boxes, [&](Cut& cut) {
    partners_of(perm, cut.batch);
    const int64_t plane = cut.plane() * element, row = cut.row() * element;
    parallel_for(cut.batch * cut.planes, std::max<int64_t>(1, kGrain / cut.plane()), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t sample = u / cut.planes, p = u % cut.planes;
        const int64_t* box = cut.boxes + sample * cut.box_step;
        const char* from = static_cast<const char*>(cut.x) + (cut.partner[sample] * cut.planes + p) * plane;
        char* to = static_cast<char*>(cut.out) + u * plane;
        std::memcpy(to, static_cast<const char*>(cut.x) + u * plane, static_cast<size_t>(plane));
        const int64_t left = box[2] * cut.depth * element, bytes = (box[3] - box[2]) * cut.depth * element;
        for (int64_t line = box[0] * cut.between; line < box[1] * cut.between && bytes > 0; ++line) {
          std::memcpy(to + line * row + left, from + line * row + left, static_cast<size_t>(bytes));
        }
      }
    });
  });
}

Tensor cutmix_bwd(const Tensor& grad, const Tensor& perm, const Tensor& boxes) {
  const mixup::Kernel& kernel = mixup_kernel(grad.scalar_type());
  return mixup::run_cut(grad, perm, boxes, [&](Cut& cut) {
    const Lists lists(partners_of(perm, cut.batch), cut.batch);
    cut.head = lists.head.data(), cut.next = lists.next.data();
    parallel_for(cut.batch * cut.planes, std::max<int64_t>(1, kGrain / cut.plane()), [&](int64_t begin, int64_t end) {
      std::vector<double> row(static_cast<size_t>(cut.row()));
      for (int64_t u = begin; u < end; ++u) kernel.cut_backward(cut, u / cut.planes, u % cut.planes, row.data());
    });
  });
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_mixup_fwd(Tensor x, float lam, Tensor? lams, Tensor perm) -> Tensor");
  m.def("_mixup_bwd(Tensor grad, float lam, Tensor? lams, Tensor perm) -> Tensor");
  m.def("_mixup_lam_bwd(Tensor grad, Tensor x, Tensor perm) -> Tensor");
  m.def("_mixup_cut_fwd(Tensor x, Tensor perm, Tensor boxes) -> Tensor");
  m.def("_mixup_cut_bwd(Tensor grad, Tensor perm, Tensor boxes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_mixup_fwd", torchlin::mixup_fwd);
  TORCHLIN_IMPL(m, "_mixup_bwd", torchlin::mixup_bwd);
  TORCHLIN_IMPL(m, "_mixup_lam_bwd", torchlin::mixup_lam_bwd);
  TORCHLIN_IMPL(m, "_mixup_cut_fwd", torchlin::cutmix_fwd);
  TORCHLIN_IMPL(m, "_mixup_cut_bwd", torchlin::cutmix_bwd);
}
