// The three-point loss's raw ops on CUDA: allocation and launches. Schemas are in op.cpp.
#include <tuple>

#include "core/op.h"
#include "core/tensor.h"
#include "gpu/launch.h"
#include "linearity/args.h"
#include "linearity/launch.h"

namespace torchlin {
namespace {

using linearity::Arguments;
using linearity::OptionalTensor;
using linearity::Reduction;

auto launcher(const Tensor& t) {
  return [stream = current_stream(t)](auto kernel, unsigned grid, int threads, size_t shared_bytes, const auto&... arguments) {
    gpu::launch(stream, kernel, dim3(grid), threads, shared_bytes, arguments...);
  };
}

void run(Arguments& arguments, const Tensor& like, const Tensor* value) {
  TORCHLIN_CHECK(like.scalar_type() == ScalarType::Float, "linearity: on CUDA expected float32; float64 is for the reference");
  const int64_t samples = arguments.job.samples, sizes[] = {samples + 1}, strides[] = {1};
  // Freed on return, when the kernels may not have run: the caching allocator hands it out again in stream order only.
  const Tensor scratch = empty_strided(like, 1, sizes, strides, static_cast<int32_t>(ScalarType::Double));
  linearity::run(arguments.job, arguments.reduction == Reduction::mean, arguments.reduction != Reduction::none,
                 value == nullptr ? nullptr : static_cast<float*>(value->mutable_data_ptr()),
                 static_cast<double*>(scratch.mutable_data_ptr()), launcher(like));
}

std::tuple<Tensor, Tensor> linearity_fwd(TORCHLIN_LINEARITY_PARAMETERS) {
  const DeviceGuard guard(a.get_device_index());
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  Tensor value = arguments.value(), losses = arguments.losses();
  arguments.job.losses = losses.mutable_data_ptr();
  run(arguments, a, &value);
  return {value, losses};
}

std::tuple<Tensor, Tensor, Tensor> linearity_fwd_grad(TORCHLIN_LINEARITY_PARAMETERS) {
  const DeviceGuard guard(a.get_device_index());
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  Tensor value = arguments.value(), dlogits = arguments.dlogits(), dmix = arguments.dmix();
  arguments.job.dlogits = dlogits.mutable_data_ptr();
  arguments.job.dmix = dmix.mutable_data_ptr();
  run(arguments, a, &value);
  return {value, dlogits, dmix};
}

std::tuple<Tensor, Tensor> linearity_bwd(const OptionalTensor& grad_value, const OptionalTensor& grad_losses,
                                         TORCHLIN_LINEARITY_PARAMETERS) {
  const DeviceGuard guard(a.get_device_index());
  Arguments arguments(TORCHLIN_LINEARITY_ARGUMENTS);
  arguments.set_gradients(grad_value, grad_losses);
  Tensor dlogits = arguments.dlogits(), dmix = arguments.dmix();
  arguments.job.dlogits = dlogits.mutable_data_ptr();
  arguments.job.dmix = dmix.mutable_data_ptr();
  run(arguments, a, nullptr);
  return {dlogits, dmix};
}

void linearity_scale(Tensor rows, const Tensor& by) {
  const DeviceGuard guard(rows.get_device_index());
  linearity::check_scale(rows, by);
  TORCHLIN_CHECK(rows.scalar_type() == ScalarType::Float, "linearity: on CUDA expected float32; float64 is for the reference");
  linearity::run_scale(static_cast<float*>(rows.mutable_data_ptr()), rows.size(1), static_cast<const float*>(by.const_data_ptr()),
                       by.dim() == 0 ? 0 : by.stride(0), rows.size(0) / 3, launcher(rows));
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_linearity_fwd", torchlin::linearity_fwd);
  TORCHLIN_IMPL(m, "_linearity_fwd_grad", torchlin::linearity_fwd_grad);
  TORCHLIN_IMPL(m, "_linearity_bwd", torchlin::linearity_bwd);
  TORCHLIN_IMPL(m, "_linearity_scale_", torchlin::linearity_scale);
}
