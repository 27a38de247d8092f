#include <optional>

#include "core/op.h"
#include "gpu/launch.h"
#include "mixup/launch.h"
#include "mixup/setup.h"

namespace torchlin {
namespace {

using mixup::Cut;
using mixup::Mix;

auto launcher(const Tensor& x) {
  const cudaStream_t stream = current_stream(x);
  return [stream](auto kernel, unsigned grid, int threads, size_t shared_bytes, const auto&... args) {
    gpu::launch(stream, kernel, grid, threads, shared_bytes, args...);
  };
}

Tensor empty_vector(const Tensor& like, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, dtype);
}

const void* weights_of(const std::optional<Tensor>& lams, int64_t batch) {
  if (!lams) return nullptr;
  TORCHLIN_CHECK(lams->numel() == batch && lams->is_contiguous(), "mixup: lam does not fit x");
  return lams->const_data_ptr();
}

// head and next of a job, in one tensor that has to live until its kernels are launched.
template <class Job>
Tensor link(Job& job, const Tensor& x) {
  Tensor lists = empty_vector(x, 2 * job.batch, aoti_torch_dtype_int64());
  int64_t* const head = static_cast<int64_t*>(lists.mutable_data_ptr());
  mixup::launch_link(job.partner, job.batch, head, head + job.batch, launcher(x));
  job.head = head, job.next = head + job.batch;
  return lists;
}

Mix mix_for(const Tensor& x, const Tensor& out, const Tensor& perm) {
  Mix mix = mixup::mix_of(out);
  mixup::check_partners(perm, mix.batch);
  mix.x = x.const_data_ptr();
  mix.partner = static_cast<const int64_t*>(perm.const_data_ptr());
  return mix;
}

Tensor mixup_fwd(const Tensor& given, double lam, const std::optional<Tensor>& lams, const Tensor& perm) {
  const DeviceGuard guard(given.get_device_index());
  Tensor out = empty_like(given);
  if (given.numel() == 0) return out;
  const Tensor x = in_layout_of(given, out);
  Mix mix = mix_for(x, out, perm);
  mix.out = out.mutable_data_ptr();
  dispatch_float(x.scalar_type(), [&](auto tag) {
    mixup::launch_forward<typename decltype(tag)::type>(mix, lam, weights_of(lams, mix.batch), launcher(x));
  });
  return out;
}

Tensor mixup_bwd(const Tensor& given, double lam, const std::optional<Tensor>& lams, const Tensor& perm) {
  const DeviceGuard guard(given.get_device_index());
  Tensor dx = empty_like(given);
  if (given.numel() == 0) return dx;
  const Tensor grad = in_layout_of(given, dx);
  Mix mix = mix_for(grad, dx, perm);
  mix.out = dx.mutable_data_ptr();
  const Tensor lists = link(mix, grad);
  dispatch_float(grad.scalar_type(), [&](auto tag) {
    mixup::launch_backward<typename decltype(tag)::type>(mix, lam, weights_of(lams, mix.batch), launcher(grad));
  });
  return dx;
}

Tensor mixup_lam_bwd(const Tensor& grad, const Tensor& x, const Tensor& perm) {
  TORCHLIN_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && x.dim() > 0, "mixup: grad does not fit x");
  const DeviceGuard guard(x.get_device_index());
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor out = empty_vector(x, x.sizes()[0], wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (x.numel() == 0) {
    TORCHLIN_CUDA_CHECK(cudaMemsetAsync(out.mutable_data_ptr(), 0, static_cast<size_t>(out.numel()) * (wide ? 8 : 4), current_stream(x)));
    return out;
  }
  const Tensor like = is_nonoverlapping_and_dense(x) ? x : empty_like(x);
  const Tensor own = in_layout_of(x, like), slopes = in_layout_of(grad, like);
  Mix mix = mixup::mix_of(like);
  mixup::check_partners(perm, mix.batch);
  mix.x = slopes.const_data_ptr(), mix.other = own.const_data_ptr();
  mix.partner = static_cast<const int64_t*>(perm.const_data_ptr());
  Tensor sums = empty_vector(x, mix.batch * mixup::lam_parts_of(mix), aoti_torch_dtype_float64());
  dispatch_float(x.scalar_type(), [&](auto tag) {
    mixup::launch_lam_backward<typename decltype(tag)::type>(mix, static_cast<double*>(sums.mutable_data_ptr()),
                                                             out.mutable_data_ptr(), launcher(x));
  });
  return out;
}

Tensor cutmix_fwd(const Tensor& x, const Tensor& perm, const Tensor& boxes) {
  const DeviceGuard guard(x.get_device_index());
  return mixup::run_cut(x, perm, boxes, [&](Cut& cut) {
    dispatch_float(x.scalar_type(), [&](auto tag) { mixup::launch_cut<typename decltype(tag)::type>(cut, false, launcher(x)); });
  });
}

Tensor cutmix_bwd(const Tensor& grad, const Tensor& perm, const Tensor& boxes) {
  const DeviceGuard guard(grad.get_device_index());
  return mixup::run_cut(grad, perm, boxes, [&](Cut& cut) {
    const Tensor lists = link(cut, grad);
    dispatch_float(grad.scalar_type(), [&](auto tag) { mixup::launch_cut<typename decltype(tag)::type>(cut, true, launcher(grad)); });
  });
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_mixup_fwd", torchlin::mixup_fwd);
  TORCHLIN_IMPL(m, "_mixup_bwd", torchlin::mixup_bwd);
  TORCHLIN_IMPL(m, "_mixup_lam_bwd", torchlin::mixup_lam_bwd);
  TORCHLIN_IMPL(m, "_mixup_cut_fwd", torchlin::cutmix_fwd);
  TORCHLIN_IMPL(m, "_mixup_cut_bwd", torchlin::cutmix_bwd);
}
