#include <cmath>
#include <optional>
#include <vector>

#include "core/op.h"
#include "core/tensor.h"
#include "gpu/launch.h"
#include "hadamard/launch.h"

namespace torchlin {
namespace {

hadamard::Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return hadamard::Type::f32;
    case ScalarType::Double: return hadamard::Type::f64;
    case ScalarType::Half: return hadamard::Type::f16;
    case ScalarType::BFloat16: return hadamard::Type::bf16;
    default: TORCHLIN_CHECK(false, "hadamard: expected float32, float64, float16 or bfloat16");
  }
#if defined(__GNUC__)
  __builtin_unreachable();
#endif
}

uintptr_t address(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); }

void run(const Tensor& x, double scale, int64_t dim, int64_t order, const std::optional<Tensor>& signs,
         const std::optional<Tensor>& had_k, bool transpose, const Tensor& out) {
  const int64_t K = had_k ? had_k->size(0) : 1;
  TORCHLIN_CHECK(dim >= 0 && dim < x.dim(), "hadamard: dim is out of range");
  TORCHLIN_CHECK(order >= 1 && x.size(dim) % order == 0, "hadamard: the order does not divide the axis");
  TORCHLIN_CHECK(order % K == 0 && (order / K & (order / K - 1)) == 0, "hadamard: the order is not K * 2^k");
  if (x.numel() == 0) return;

  hadamard::Transform t{};
  t.type = type_of(x.scalar_type());
  const auto sizes = x.sizes(), x_strides = x.strides(), y_strides = out.strides();
  t.sizes.assign(sizes.begin(), sizes.end());
  t.x_strides.assign(x_strides.begin(), x_strides.end());
  t.y_strides.assign(y_strides.begin(), y_strides.end());
  t.dim = static_cast<int>(dim), t.order = order, t.K = K;
  t.x = address(x), t.y = address(out), t.signs = signs ? address(*signs) : 0;
  t.transpose = transpose;

  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(x);
  const hadamard::Device properties{
      gpu::device_attribute(cudaDevAttrMultiProcessorCount, device),
      static_cast<size_t>(gpu::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
  const hadamard::Plan plan = hadamard::make_plan(t, properties);

  // Freed on return, when the kernels may not have run: the caching allocator hands it out again in stream
  // order only.
  std::optional<Tensor> workspace;
  if (plan.workspace_elements > 0) {
    const int64_t stride = 1;
    workspace = empty_strided(x, 1, &plan.workspace_elements, &stride, aoti_torch_dtype_float32());
  }
  const hadamard::Pointers at{x.const_data_ptr(),
                              out.mutable_data_ptr(),
                              workspace ? workspace->mutable_data_ptr() : nullptr,
                              signs ? signs->const_data_ptr() : nullptr,
                              had_k ? static_cast<const int8_t*>(had_k->const_data_ptr()) : nullptr,
                              scale};
  dispatch_float(x.scalar_type(), [&](auto tag) {
    hadamard::run_plan<typename decltype(tag)::type>(
        plan, at, [&](auto kernel, unsigned grid, int threads, size_t shared_bytes, const auto&... args) {
          gpu::launch(stream, kernel, grid, threads, shared_bytes, args...);
        });
  });
}

Tensor hadamard_fwd(const Tensor& x, double scale, int64_t dim, int64_t order,
                    const std::optional<Tensor>& signs, const std::optional<Tensor>& had_k, bool transpose) {
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty_like(x);
  run(x, scale, dim, order, signs, had_k, transpose, out);
  return out;
}

Tensor hadamard_last(const Tensor& x, std::optional<double> scale) {
  TORCHLIN_CHECK(x.dim() > 0, "hadamard: x has no dimension");
  const int64_t dim = x.dim() - 1, n = x.size(dim);
  return hadamard_fwd(x, scale ? *scale : 1 / std::sqrt(static_cast<double>(n)), dim, n, {}, {}, false);
}

void hadamard_out(const Tensor& x, double scale, int64_t dim, int64_t order,
                  const std::optional<Tensor>& signs, const std::optional<Tensor>& had_k, bool transpose,
                  Tensor out) {
  run(x, scale, dim, order, signs, had_k, transpose, out);
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_hadamard_fwd", torchlin::hadamard_fwd);
  TORCHLIN_IMPL(m, "_hadamard_last", torchlin::hadamard_last);
  TORCHLIN_IMPL(m, "_hadamard_out", torchlin::hadamard_out);
}
