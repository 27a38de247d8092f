// Grid quantization's raw ops: schemas, and the CPU kernels' threads and choice of level.
#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "grid/job.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "grid/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using grid::Layout;
using grid::Linear;
using grid::Purpose;
using grid::Scratch;
using grid::Weight;

const grid::Kernel& grid_kernel() {
#if defined(__x86_64__)
  static constexpr std::array<const grid::Kernel*, kCpuIsaCount> kLevels{&baseline::kKernel, &avx2::kKernel,
                                                                         &avx512::kKernel};
  return *kLevels[static_cast<int>(cpu_isa())];
#else
  return baseline::kKernel;
#endif
}

constexpr int64_t kGrain = 32768;  // weights worth a thread

int64_t rows_worth_a_thread(int64_t work) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)); }

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, 2, sizes, strides, static_cast<int32_t>(dtype));
}

ScalarType code_type(int64_t n) { return n <= 256 ? ScalarType::Byte : ScalarType::UInt16; }

const float* points_of(const Tensor& grid) {
  TORCHLIN_CHECK(grid.scalar_type() == ScalarType::Float && grid.dim() == 2 && grid.is_contiguous(),
                 "grid: expected float32 (n, p), contiguous");
  const int64_t n = grid.sizes()[0], p = grid.sizes()[1];
  TORCHLIN_CHECK(n >= 2 && n <= 65536 && p >= 1 && p <= 8, "grid: ", n, " points of ", p, " coordinates");
  return static_cast<const float*>(grid.const_data_ptr());
}

// What finds nearest points is made once a grid. Looked up by content: the tensor may be gone, or changed, by the next call.
std::shared_ptr<const grid::NearestIndex> nearest_index(const float* points, int64_t n, int64_t p) {
  struct Entry {
    int64_t p;
    std::vector<float> points;
    std::shared_ptr<const grid::NearestIndex> index;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;  // most recently made last
  constexpr size_t kEntries = 8;

  const size_t size = static_cast<size_t>(n * p);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& e : entries) {
    if (e.p == p && e.points.size() == size && std::equal(points, points + size, e.points.data())) return e.index;
  }
  if (entries.size() == kEntries) entries.erase(entries.begin());
  entries.push_back({p, {points, points + size}, std::make_shared<const grid::NearestIndex>(points, n, p)});
  return entries.back().index;
}

Tensor grid_encode(const Tensor& x, const Tensor& grid) {
  const float* points = points_of(grid);
  TORCHLIN_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous(),
                 "grid: expected x float32 (m, k), contiguous");
  const int64_t m = x.sizes()[0], k = x.sizes()[1], n = grid.sizes()[0], p = grid.sizes()[1], count = (k + p - 1) / p;
  Tensor codes = empty(x, m, count, code_type(n));
  const float* from = static_cast<const float*>(x.const_data_ptr());
  void* to = codes.mutable_data_ptr();
  if (codes.numel() == 0) return codes;
  const auto index = nearest_index(points, n, p);
  const auto& kernel = grid_kernel();
  parallel_for(m, rows_worth_a_thread(k * 8),
               [&](int64_t begin, int64_t end) { kernel.encode(*index, from, k, to, begin, end); });
  return codes;
}

Tensor grid_decode(const Tensor& codes, const Tensor& grid) {
  const float* points = points_of(grid);
  const int64_t n = grid.sizes()[0], p = grid.sizes()[1];
  TORCHLIN_CHECK(codes.scalar_type() == code_type(n) && codes.dim() == 1 && codes.is_contiguous(),
                 "grid: expected codes (m,), contiguous, uint8 for n <= 256, else uint16");
  const int64_t m = codes.sizes()[0];
  Tensor out = empty(codes, m, p, ScalarType::Float);
  const void* from = codes.const_data_ptr();
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const auto& kernel = grid_kernel();
  parallel_for(m, rows_worth_a_thread(p),
               [&](int64_t begin, int64_t end) { kernel.decode(from, points, n, p, to, begin, end); });
  return out;
}

Tensor grid_pack(const Tensor& codes, int64_t n) {
  TORCHLIN_CHECK(n >= 2 && n <= 65536 && codes.scalar_type() == code_type(n) && codes.dim() == 2 && codes.is_contiguous(),
                 "grid: expected codes (m, count), contiguous, uint8 for n <= 256, else uint16");
  const int64_t m = codes.sizes()[0], count = codes.sizes()[1];
  Tensor packed = empty(codes, m, grid::row_bytes_of(grid::layout_of(n), count), ScalarType::Byte);
  const void* from = codes.const_data_ptr();
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const auto& kernel = grid_kernel();
  parallel_for(m, rows_worth_a_thread(count),
               [&](int64_t begin, int64_t end) { kernel.pack(from, count, n, to, begin, end); });
  return packed;
}

Tensor grid_unpack(const Tensor& packed, int64_t n, int64_t count) {
  TORCHLIN_CHECK(n >= 2 && n <= 65536 && count >= 0 && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                     packed.is_contiguous() && packed.sizes()[1] == grid::row_bytes_of(grid::layout_of(n), count),
                 "grid: packed does not hold ", count, " codes below ", n, " a row");
  const int64_t m = packed.sizes()[0];
  Tensor codes = empty(packed, m, count, code_type(n));
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* to = codes.mutable_data_ptr();
  const auto& kernel = grid_kernel();
  parallel_for(m, rows_worth_a_thread(count),
               [&](int64_t begin, int64_t end) { kernel.unpack(from, n, count, to, begin, end); });
  return codes;
}

Weight weight_of(const Tensor& packed, const Tensor& scales, const Tensor& grid, int64_t in, int64_t block) {
  Weight w{};
  w.grid = points_of(grid);
  w.n = grid.sizes()[0];
  w.p = grid.sizes()[1];
  w.layout = grid::layout_of(w.n);
  TORCHLIN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.is_contiguous() &&
                     scales.dim() == 2 && scales.is_contiguous() && in >= 0 && block >= 1,
                 "grid: expected packed uint8 and scales, both two-dimensional and contiguous");
  w.out = packed.sizes()[0];
  w.in = in;
  w.block = block;
  w.blocks = in / block + (in % block != 0);
  w.count = (in + w.p - 1) / w.p;
  w.row_bytes = packed.sizes()[1];
  w.half_scales = scales.scalar_type() == ScalarType::Half;
  TORCHLIN_CHECK(w.half_scales || scales.scalar_type() == ScalarType::Float, "grid: expected scales float16 or float32");
  TORCHLIN_CHECK(w.row_bytes == grid::row_bytes_of(w.layout, w.count) && scales.sizes()[0] == w.out &&
                     scales.sizes()[1] == w.blocks && (w.blocks <= 1 || block % w.p == 0),
                 "grid: packed, scales and block size do not fit a weight of ", in, " columns");
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  w.scales = scales.const_data_ptr();
  return w;
}

Tensor grid_dequantize(const Tensor& packed, const Tensor& scales, const Tensor& grid, int64_t in_features,
                       int64_t block_size) {
  const Weight w = weight_of(packed, scales, grid, in_features, block_size);
  Tensor weight = empty(packed, w.out, w.in, ScalarType::Float);
  float* to = static_cast<float*>(weight.mutable_data_ptr());
  if (weight.numel() == 0) return weight;
  const float* table = w.grid;
  if (const int64_t step = grid::table_step(w.p); step != w.p) {
    float* filled = Scratch::get<float>(Purpose::kTable, w.n * step);
    grid::fill_table(w.grid, w.n, w.p, step, filled);
    table = filled;
  }
  const auto& kernel = grid_kernel();
  parallel_for(w.out, rows_worth_a_thread(w.in),
               [&](int64_t begin, int64_t end) { kernel.dequantize(w, table, to, begin, end); });
  Scratch::trim();
  return weight;
}

Tensor grid_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& grid,
                   const std::optional<Tensor>& bias, int64_t block_size) {
  TORCHLIN_CHECK(x.dim() == 2 && x.is_contiguous(), "grid: expected x (batch, in_features), contiguous");
  const ScalarType dtype = x.scalar_type();
  TORCHLIN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                 "grid: expected x float32, float16 or bfloat16");
  Linear job{};
  job.weight = weight_of(packed, scales, grid, x.sizes()[1], block_size);
  job.batch = x.sizes()[0];
  TORCHLIN_CHECK(!bias || (bias->scalar_type() == dtype && bias->dim() == 1 && bias->sizes()[0] == job.weight.out &&
                           bias->is_contiguous()),
                 "grid: expected bias (out_features,) of x's dtype, contiguous");
  Tensor y = empty(x, job.batch, job.weight.out, dtype);
  if (y.numel() == 0) return y;
  job.x = x.const_data_ptr();
  job.bias = bias ? bias->const_data_ptr() : nullptr;
  job.y = y.mutable_data_ptr();
  const auto& kernel = grid_kernel().linear[dtype == ScalarType::Float ? 0 : dtype == ScalarType::Half ? 1 : 2];
  float* ready = Scratch::get<float>(Purpose::kReady, kernel.prepared(job));
  kernel.prepare(job, ready);
  job.ready = ready;
  parallel_for(job.weight.out, rows_worth_a_thread(job.weight.in),
               [&](int64_t begin, int64_t end) { kernel.rows(job, begin, end); });
  Scratch::trim();
  return y;
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_grid_encode(Tensor x, Tensor grid) -> Tensor");
  m.def("_grid_decode(Tensor codes, Tensor grid) -> Tensor");
  m.def("_grid_pack(Tensor codes, int n) -> Tensor");
  m.def("_grid_unpack(Tensor packed, int n, int count) -> Tensor");
  m.def("_grid_dequantize(Tensor packed, Tensor scales, Tensor grid, int in_features, int block_size) -> Tensor");
  m.def("_grid_linear(Tensor x, Tensor packed, Tensor scales, Tensor grid, Tensor? bias, int block_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_grid_encode", torchlin::grid_encode);
  TORCHLIN_IMPL(m, "_grid_decode", torchlin::grid_decode);
  TORCHLIN_IMPL(m, "_grid_pack", torchlin::grid_pack);
  TORCHLIN_IMPL(m, "_grid_unpack", torchlin::grid_unpack);
  TORCHLIN_IMPL(m, "_grid_dequantize", torchlin::grid_dequantize);
  TORCHLIN_IMPL(m, "_grid_linear", torchlin::grid_linear);
}
