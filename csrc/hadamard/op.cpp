// The Hadamard transform's raw ops: schemas, and the CPU kernel's geometry, threads and choice of level.
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "hadamard/job.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "hadamard/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using hadamard::CorePlan;
using hadamard::Dim;
using hadamard::Job;
using hadamard::Kernel;
using hadamard::Scratch;

const Kernel& kernel_for(ScalarType dtype) {
#if defined(__x86_64__)
  static constexpr std::array<const Kernel*, kCpuIsaCount> kLevels{baseline::kKernels, avx2::kKernels, avx512::kKernels};
#else
  static constexpr std::array<const Kernel*, kCpuIsaCount> kLevels{baseline::kKernels, baseline::kKernels, baseline::kKernels};
#endif
  const Kernel* kernels = kLevels[static_cast<int>(cpu_isa())];
  return dispatch_float(dtype, [&](auto tag) -> const Kernel& {
    using T = typename decltype(tag)::type;
    return kernels[std::is_same_v<T, float> ? 0 : std::is_same_v<T, double> ? 1 : std::is_same_v<T, Half> ? 2 : 3];
  });
}

// The plan of a matrix is made once. Looked up by content: the tensor may be gone, or changed, by the next call.
std::shared_ptr<const CorePlan> core_plan(const Tensor& had_k, bool transpose) {
  struct Entry {
    std::vector<int8_t> matrix;
    bool transpose;
    std::shared_ptr<const CorePlan> plan;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;  // most recently made last
  constexpr size_t kEntries = 32;

  const int8_t* matrix = static_cast<const int8_t*>(had_k.data_ptr());
  const int64_t K = had_k.sizes()[0];
  const size_t bytes = static_cast<size_t>(K * K);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& e : entries) {
    if (e.transpose == transpose && e.matrix.size() == bytes && std::memcmp(e.matrix.data(), matrix, bytes) == 0) return e.plan;
  }
  if (entries.size() == kEntries) entries.erase(entries.begin());
  entries.push_back({{matrix, matrix + bytes}, transpose,
                     std::make_shared<const CorePlan>(matrix, static_cast<int32_t>(K), transpose)});
  return entries.back().plan;
}

// Batch dimensions, and the blocks of the transformed one, sorted by the output's strides and merged where they touch.
void set_dims(Job& job, const Tensor& x, const Tensor& out, int64_t dim) {
  const auto sizes = x.sizes(), src = x.strides(), dst = out.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size());
  job.src_step = src[dim];
  job.dst_step = dst[dim];
  job.rows = 1;
  for (int64_t i = 0; i < ndim; ++i) {
    Dim d{sizes[i], src[i], dst[i], 0};
    if (i == dim) d = {sizes[i] / job.order, src[i] * job.order, dst[i] * job.order, job.signs != nullptr ? job.order : 0};
    job.rows *= d.size;
    if (d.size == 1) continue;
    int at = job.ndim++;
    for (; at > 0 && job.dims[at - 1].dst < d.dst; --at) job.dims[at] = job.dims[at - 1];
    job.dims[at] = d;
  }
  int kept = 0;
  for (int i = 1; i < job.ndim; ++i) {
    Dim& outer = job.dims[kept];
    const Dim& inner = job.dims[i];
    if (outer.src == inner.src * inner.size && outer.dst == inner.dst * inner.size && outer.sign == inner.sign * inner.size) {
      outer = {outer.size * inner.size, inner.src, inner.dst, inner.sign};
    } else {
      job.dims[++kept] = inner;
    }
  }
  if (job.ndim > 0) job.ndim = kept + 1;
  if (job.order == 1) job.src_step = job.dst_step = 1;
}

void transform(const Tensor& x, double scale, int64_t dim, int64_t order, const std::optional<Tensor>& signs,
               const std::optional<Tensor>& had_k, bool transpose, const Tensor& out) {
  if (x.numel() == 0) return;
  const int64_t K = had_k ? had_k->sizes()[0] : 1;
  TORCHLIN_CHECK(dim >= 0 && dim < x.dim() && order > 0 && x.sizes()[dim] % order == 0 && order % K == 0,
                 "hadamard: order ", order, " does not fit dim ", dim);
  const ScalarType dtype = x.scalar_type();
  const Kernel& kernel = kernel_for(dtype);
  const int64_t element = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;

  Job job;
  job.order = order;
  while ((K << job.log2) < order) ++job.log2;
  TORCHLIN_CHECK((K << job.log2) == order, "hadamard: order ", order, " is not ", K, " times a power of two");
  std::shared_ptr<const CorePlan> core;
  if (K > 1) core = core_plan(*had_k, transpose);
  job.core = core.get();
  job.scale = scale;
  job.signs = signs ? signs->data_ptr() : nullptr;
  job.signs_last = transpose;
  set_dims(job, x, out, dim);

  const char* src = static_cast<const char*>(x.data_ptr());
  char* dst = static_cast<char*>(out.data_ptr());
  constexpr int64_t kGrain = 32768;  // elements worth a thread

  // Fewer long rows than threads: the threads share each row, first its blocks, then the columns across them.
  constexpr int64_t kLongRow = 1 << 17, kColumnUnit = 64;
  if (job.contiguous() && order >= kLongRow && job.rows < num_threads()) {
    int64_t blocks = 1, width = 0;
    kernel.split(job, &blocks, &width);
    if (width >= kColumnUnit) {
      for (int64_t row = 0; row < job.rows; ++row) {
        int64_t rest = row, s = 0, d = 0, g = 0;
        for (int i = job.ndim - 1; i >= 0; --i) {
          const int64_t at = rest % job.dims[i].size;
          rest /= job.dims[i].size;
          s += at * job.dims[i].src, d += at * job.dims[i].dst, g += at * job.dims[i].sign;
        }
        const char* from = src + s * element;
        char* to = dst + d * element;
        const char* row_signs =
            job.signs == nullptr ? nullptr : static_cast<const char*>(job.signs) + g * (element == 8 ? 8 : 4);
        void* work = element == 2 ? static_cast<void*>(Scratch::get<float>(Scratch::kRow, order)) : to;
        parallel_for(blocks, std::max<int64_t>(1, kGrain / width),
                     [&](int64_t begin, int64_t end) { kernel.run_blocks(job, from, work, row_signs, begin, end); });
        parallel_for(width / kColumnUnit, std::max<int64_t>(1, kGrain / kColumnUnit / blocks), [&](int64_t begin, int64_t end) {
          kernel.run_columns(job, work, to, row_signs, begin * kColumnUnit, end * kColumnUnit);
        });
      }
      Scratch::trim();
      return;
    }
  }

  const int64_t units = kernel.units(job);
  const int64_t grain = std::max<int64_t>(1, kGrain / (job.order * (job.rows / units)));
  parallel_for(units, grain, [&](int64_t begin, int64_t end) { kernel.run(job, src, dst, begin, end); });
}

Tensor hadamard_fwd(const Tensor& x, double scale, int64_t dim, int64_t order, const std::optional<Tensor>& signs,
                    const std::optional<Tensor>& had_k, bool transpose) {
  Tensor out = empty_like(x);
  transform(x, scale, dim, order, signs, had_k, transpose, out);
  return out;
}

// The plainest call: all of the last dimension, a power of two. Every argument that a schema has costs each call time, which
// is most of a small tensor's.
Tensor hadamard_last(const Tensor& x, std::optional<double> scale) {
  const auto sizes = x.sizes();
  TORCHLIN_CHECK(sizes.size() > 0, "hadamard: x has no dimension");
  const int64_t n = sizes[sizes.size() - 1];
  Tensor out = empty_like(x);
  transform(x, scale ? *scale : 1 / std::sqrt(static_cast<double>(n)), static_cast<int64_t>(sizes.size()) - 1, n, {}, {}, false, out);
  return out;
}

void hadamard_out(const Tensor& x, double scale, int64_t dim, int64_t order, const std::optional<Tensor>& signs,
                  const std::optional<Tensor>& had_k, bool transpose, Tensor out) {
  transform(x, scale, dim, order, signs, had_k, transpose, out);
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_hadamard_fwd(Tensor x, float scale, int dim, int order, Tensor? signs, Tensor? had_k, bool transpose) -> Tensor");
  m.def("_hadamard_last(Tensor x, float? scale=None) -> Tensor");
  m.def(
      "_hadamard_out(Tensor x, float scale, int dim, int order, Tensor? signs, Tensor? had_k, bool transpose, Tensor(a!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_hadamard_fwd", torchlin::hadamard_fwd);
  TORCHLIN_IMPL(m, "_hadamard_last", torchlin::hadamard_last);
  TORCHLIN_IMPL(m, "_hadamard_out", torchlin::hadamard_out);
}
