// The grid family's raw ops on CUDA: checks, allocation and launches. Schemas are in op.cpp.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <optional>

#include "core/op.h"
#include "core/tensor.h"
#include "gpu/launch.h"
#include "grid/launch.h"

namespace torchlin {
namespace {

using grid::Type;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: TORCHLIN_CHECK(false, "grid: on CUDA expected float32, float16 or bfloat16; float64 is for the reference");
  }
#if defined(__GNUC__)
  __builtin_unreachable();
#endif
}

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, int32_t dtype) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, 2, sizes.data(), strides.data(), dtype);
}

int32_t dtype_of_codes(int64_t n) { return n <= 256 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_uint16(); }

const float* check_grid(const Tensor& grid, const Tensor& beside) {
  TORCHLIN_CHECK(grid.dim() == 2 && grid.scalar_type() == ScalarType::Float && grid.is_contiguous() && grid.size(0) >= 2 &&
                     grid.size(0) <= 65536 && grid.size(1) >= 1 && grid.size(1) <= 8 &&
                     grid.get_device_index() == beside.get_device_index(),
                 "grid: the grid must be a contiguous float32 tensor (n, p), 2 <= n <= 65536, 1 <= p <= 8, on the others' device");
  return static_cast<const float*>(grid.const_data_ptr());
}

void check_codes(const Tensor& codes, int64_t n, int64_t dim) {
  TORCHLIN_CHECK(n >= 2 && n <= 65536, "grid: n must be in [2, 65536], got ", n);
  TORCHLIN_CHECK(codes.dim() == dim && codes.is_contiguous() &&
                     codes.scalar_type() == (n <= 256 ? ScalarType::Byte : ScalarType::UInt16),
                 "grid: codes must be contiguous, ", dim, "-dimensional, uint8 up to n = 256 and uint16 above");
}

// launch(kernel, grid x, grid y, threads, shared bytes, arguments) on torch's stream.
auto launcher(const Tensor& t) {
  return [stream = current_stream(t)](auto kernel, unsigned x, unsigned y, int threads, size_t shared_bytes,
                                      const auto& arguments) {
    gpu::launch(stream, kernel, dim3(x, y), threads, shared_bytes, arguments);
  };
}

Tensor grid_encode(const Tensor& x, const Tensor& grid) {
  const DeviceGuard guard(x.get_device_index());
  const float* points = check_grid(grid, x);
  TORCHLIN_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                 "grid: x must be a contiguous float32 tensor (m, k)");
  grid::Encode a{};
  a.x = static_cast<const float*>(x.const_data_ptr()), a.grid = points;
  a.rows = x.size(0), a.k = x.size(1), a.n = static_cast<int>(grid.size(0)), a.p = static_cast<int>(grid.size(1));
  Tensor codes = empty(x, a.rows, (a.k + a.p - 1) / a.p, dtype_of_codes(a.n));
  a.codes = codes.mutable_data_ptr();
  grid::run_encode(a, launcher(x));
  return codes;
}

Tensor grid_decode(const Tensor& codes, const Tensor& grid) {
  const DeviceGuard guard(codes.get_device_index());
  const float* points = check_grid(grid, codes);
  check_codes(codes, grid.size(0), 1);
  Tensor out = empty(codes, codes.size(0), grid.size(1), aoti_torch_dtype_float32());
  grid::run_decode({codes.const_data_ptr(), points, static_cast<float*>(out.mutable_data_ptr()), codes.size(0),
                    static_cast<int>(grid.size(0)), static_cast<int>(grid.size(1))},
                   launcher(codes));
  return out;
}

Tensor grid_pack(const Tensor& codes, int64_t n) {
  check_codes(codes, n, 2);
  const DeviceGuard guard(codes.get_device_index());
  Tensor packed = empty(codes, codes.size(0), grid::bytes_of_row(n, codes.size(1)), aoti_torch_dtype_uint8());
  grid::run_pack(grid::pack_of(codes.const_data_ptr(), packed.mutable_data_ptr(), codes.size(0), codes.size(1), n),
                 launcher(codes));
  return packed;
}

void check_packed(const Tensor& packed, int64_t n, int64_t count) {
  TORCHLIN_CHECK(n >= 2 && n <= 65536 && count >= 0, "grid: n must be in [2, 65536], got ", n);
  TORCHLIN_CHECK(packed.dim() == 2 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
                     packed.size(1) == grid::bytes_of_row(n, count),
                 "grid: packed must be a contiguous uint8 tensor of ", grid::bytes_of_row(n, count), " bytes a row");
}

Tensor grid_unpack(const Tensor& packed, int64_t n, int64_t count) {
  check_packed(packed, n, count);
  const DeviceGuard guard(packed.get_device_index());
  Tensor codes = empty(packed, packed.size(0), count, dtype_of_codes(n));
  grid::run_unpack(grid::pack_of(codes.mutable_data_ptr(), packed.const_data_ptr(), packed.size(0), count, n),
                   launcher(packed));
  return codes;
}

grid::Weight weight_of(const Tensor& packed, const Tensor& scales, const Tensor& grid, int64_t in_features,
                       int64_t block_size) {
  grid::Weight w{};
  w.grid = check_grid(grid, packed);
  w.n = grid.size(0), w.p = grid.size(1), w.in_features = in_features, w.block_size = block_size;
  TORCHLIN_CHECK(block_size >= 1 && (block_size >= in_features || block_size % w.p == 0),
                 "grid: block_size must be a multiple of p, got ", block_size);
  check_packed(packed, w.n, w.codes());
  w.out_features = packed.size(0);
  w.half_scales = scales.scalar_type() == ScalarType::Half;
  TORCHLIN_CHECK(scales.dim() == 2 && scales.is_contiguous() && (w.half_scales || scales.scalar_type() == ScalarType::Float) &&
                     scales.size(0) == w.out_features && scales.size(1) == (in_features + block_size - 1) / block_size &&
                     scales.get_device_index() == packed.get_device_index(),
                 "grid: scales must be a contiguous float16 or float32 tensor, one a row and block");
  w.packed = packed.const_data_ptr(), w.scales = scales.const_data_ptr();
  return w;
}

Tensor grid_dequantize(const Tensor& packed, const Tensor& scales, const Tensor& grid, int64_t in_features,
                       int64_t block_size) {
  const DeviceGuard guard(packed.get_device_index());
  const grid::Weight w = weight_of(packed, scales, grid, in_features, block_size);
  Tensor out = empty(packed, w.out_features, in_features, aoti_torch_dtype_float32());
  grid::run_dequantize(w, 0, w.out_features, Type::f32, out.mutable_data_ptr(), launcher(packed));
  return out;
}

// torch.nn.functional.linear
Tensor multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor slice(const Tensor& t, int64_t dim, int64_t start, int64_t length) {
  AtenTensorHandle part = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_narrow(t.get(), dim, start, length, &part));
  return Tensor(part);
}

// The weight is made in x's type, some rows at a time, and torch multiplies.
void run_dense(const grid::Weight& w, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& out) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const Type type = type_of(x);
  const int64_t row_bytes = w.in_features * (type == Type::f32 ? 4 : 2);
  const int64_t at_once = std::clamp<int64_t>(grid::kDenseBytes / row_bytes / 64 * 64, 64, w.out_features);
  Tensor weight = empty(x, at_once, w.in_features, dtype);
  for (int64_t first = 0; first < w.out_features; first += at_once) {
    const int64_t rows = std::min(at_once, w.out_features - first);
    grid::run_dequantize(w, first, rows, type, weight.mutable_data_ptr(), launcher(x));
    const std::optional<Tensor> part = bias ? std::optional<Tensor>(slice(*bias, 0, first, rows)) : std::nullopt;
    const Tensor y = multiply(x, slice(weight, 0, 0, rows), part);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(slice(out, 1, first, rows).get(), y.get(), 0));
  }
}

Tensor grid_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& grid,
                   const std::optional<Tensor>& bias, int64_t block_size) {
  const DeviceGuard guard(x.get_device_index());
  TORCHLIN_CHECK(x.dim() == 2 && x.is_contiguous() && x.get_device_index() == packed.get_device_index(),
                 "grid: x must be a contiguous tensor (b, in_features) on the weight's device");
  const grid::Weight w = weight_of(packed, scales, grid, x.size(1), block_size);
  TORCHLIN_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.out_features && bias->is_contiguous() &&
                           bias->scalar_type() == x.scalar_type() && bias->get_device_index() == x.get_device_index()),
                 "grid: bias must be a contiguous tensor (out_features,) of x's dtype and device");
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor out = empty(x, x.size(0), w.out_features, dtype);
  if (out.numel() == 0) return out;

  const int device = x.get_device_index();
  const grid::Device properties{
      gpu::device_attribute(cudaDevAttrMultiProcessorCount, device),
      static_cast<size_t>(gpu::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
  const grid::Plan plan = grid::Planner(w, x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(),
                                  type_of(x), x.size(0), properties)
                        .take();
  if (plan.path == grid::Path::dense) {
    run_dense(w, x, bias, out);
    return out;
  }
  // Freed on return, when the kernels may not have run: the caching allocator hands it out again in stream order only.
  std::optional<Tensor> workspace;
  if (plan.workspace > 0) workspace = empty(x, 1, plan.workspace, aoti_torch_dtype_float32());
  grid::run_linear(plan, workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr, launcher(x));
  return out;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_IMPL(torchlin, CUDA, m) {
  TORCHLIN_IMPL(m, "_grid_encode", torchlin::grid_encode);
  TORCHLIN_IMPL(m, "_grid_decode", torchlin::grid_decode);
  TORCHLIN_IMPL(m, "_grid_pack", torchlin::grid_pack);
  TORCHLIN_IMPL(m, "_grid_unpack", torchlin::grid_unpack);
  TORCHLIN_IMPL(m, "_grid_dequantize", torchlin::grid_dequantize);
  TORCHLIN_IMPL(m, "_grid_linear", torchlin::grid_linear);
}
