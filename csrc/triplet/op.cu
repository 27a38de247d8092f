#include <limits>
#include <tuple>

#include "core/op.h"
#include "gpu/launch.h"
#include "triplet/launch.h"
#include "triplet/setup.h"

namespace torchlin {
namespace {

using triplet::Job;
using triplet::Setup;

auto launcher(cudaStream_t stream) {
  return [stream](auto kernel, unsigned grid, int threads, size_t shared_bytes, const auto&... args) {
    gpu::launch(stream, kernel, grid, threads, shared_bytes, args...);
  };
}

// A call up to its main kernel: the job, and in the ball the samples' lengths.
struct CudaCall {
  Setup setup;
  const int64_t* seed;
  std::optional<Tensor> lengths;

  CudaCall(const Tensor& x, const std::optional<Tensor>& eps_at, const Tensor& seed_tensor, bool ball,
           std::optional<double> low, std::optional<double> high)
      : setup(x, eps_at, ball, low, high) {
    TORCHLIN_CHECK(seed_tensor.scalar_type() == ScalarType::Long && seed_tensor.numel() == 1, "triplet: seed must be one int64");
    seed = static_cast<const int64_t*>(seed_tensor.const_data_ptr());
    Job& job = setup.job;
    if (!job.clip) job.low = -std::numeric_limits<double>::infinity(), job.high = -job.low;
    if (!ball || x.numel() == 0) return;
    const int64_t sizes[] = {2 * job.batch}, strides[] = {1};
    lengths = empty_strided(x, 1, sizes, strides, aoti_torch_dtype_int64());
    const cudaStream_t stream = current_stream(x);
    TORCHLIN_CUDA_CHECK(cudaMemsetAsync(lengths->mutable_data_ptr(), 0, static_cast<size_t>(2 * job.batch) * 8, stream));
    dispatch_float(x.scalar_type(), [&](auto tag) {
      triplet::launch_lengths<gpu::accumulate_t<typename decltype(tag)::type>>(
          job, seed, static_cast<unsigned long long*>(lengths->mutable_data_ptr()), launcher(stream));
    });
  }
  const int64_t* lengths_data() const { return lengths ? static_cast<const int64_t*>(lengths->const_data_ptr()) : nullptr; }
};

std::tuple<Tensor, Tensor> triplet_fwd(const Tensor& x, double eps, const std::optional<Tensor>& eps_at, const Tensor& seed,
                                       bool ball, std::optional<double> low, std::optional<double> high) {
  const DeviceGuard guard(x.get_device_index());
  CudaCall call(x, eps_at, seed, ball, low, high);
  Job& job = call.setup.job;
  Tensor out = triplet::empty_batch(x, 3 * job.batch, call.setup.strides);
  const int64_t stride = 1;
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor mix = empty_strided(x, 1, &job.batch, &stride, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  job.out = out.mutable_data_ptr();
  dispatch_float(x.scalar_type(), [&](auto tag) {
    triplet::launch_forward<typename decltype(tag)::type>(job, call.seed, call.lengths_data(), eps, mix.mutable_data_ptr(),
                                                          launcher(current_stream(x)));
  });
  return {std::move(out), std::move(mix)};
}

Tensor triplet_bwd(const Tensor& grad, const Tensor& x, double eps, const std::optional<Tensor>& eps_at, const Tensor& seed,
                   bool ball, double low, double high) {
  TORCHLIN_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == 3 * x.numel(), "triplet: grad does not fit x");
  const DeviceGuard guard(x.get_device_index());
  CudaCall call(x, eps_at, seed, ball, low, high);
  Job& job = call.setup.job;
  const Tensor slopes = triplet::with_strides(grad, call.setup.strides, true);
  Tensor dx = triplet::empty_batch(x, job.batch, call.setup.strides);
  job.grad = slopes.const_data_ptr(), job.out = dx.mutable_data_ptr();
  dispatch_float(x.scalar_type(), [&](auto tag) {
    triplet::launch_backward<typename decltype(tag)::type>(job, call.seed, call.lengths_data(), eps,
                                                           launcher(current_stream(x)));
  });
  return dx;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_triplet_fwd", torchlin::triplet_fwd);
  TORCHLIN_IMPL(m, "_triplet_bwd", torchlin::triplet_bwd);
}
