// From tensors to jobs: what the CPU and CUDA sides of a call have in common.
#pragma once

#include <optional>
#include <vector>

#include "core/op.h"
#include "core/tensor.h"
#include "mixup/job.h"

namespace torchlin::mixup {

inline void check_partners(const Tensor& perm, int64_t batch) {
  TORCHLIN_CHECK(perm.scalar_type() == ScalarType::Long && perm.dim() == 1 && perm.numel() == batch && perm.is_contiguous(),
                 "mixup: perm does not fit x");
}

// The geometry of tensors that have the strides of `out`, which is dense.
inline Mix mix_of(const Tensor& out) {
  TORCHLIN_CHECK(out.dim() > 0, "mixup: x has no dimension");
  Mix mix{};
  mix.batch = out.sizes()[0];
  mix.inner = mix.batch > 1 ? out.strides()[0] : out.numel();
  mix.outer = out.numel() == 0 ? 0 : out.numel() / (mix.batch * mix.inner);
  return mix;
}

// That of images, whose last two dimensions are height and width. Memory in which the batch is not outermost, or which runs
// along columns, has none.
inline std::optional<Cut> cut_of(const Tensor& out) {
  const auto sizes = out.sizes(), strides = out.strides();
  const size_t d = sizes.size();
  TORCHLIN_CHECK(d >= 3, "cutmix: x has fewer than three dimensions");
  Cut cut{};
  cut.batch = sizes[0], cut.height = sizes[d - 2], cut.width = sizes[d - 1];
  if (out.numel() == 0) return cut;
  const int64_t sample = out.numel() / cut.batch;
  // A dimension of one element says nothing about the layout.
  cut.depth = cut.width > 1 ? strides[d - 1] : 1;
  int64_t line = cut.depth * cut.width;  // what is between two heights
  if (cut.height > 1) {
    if (strides[d - 2] % line != 0) return std::nullopt;
    cut.between = strides[d - 2] / line;
  } else {
    cut.between = 1;
  }
  if (cut.batch > 1 && strides[0] != sample) return std::nullopt;
  const int64_t plane = line * cut.between * cut.height;
  if (plane == 0 || sample % plane != 0) return std::nullopt;
  cut.planes = sample / plane;
  return cut;
}

inline Tensor row_major_like(const Tensor& x) {
  const auto sizes = x.sizes();
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(sizes[d], 1)) strides[d] = step;
  return empty_strided(x, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
}

// Runs f(cut, x, out) on dense tensors of a layout that has a geometry; the result is laid out as torch.empty_like(x).
template <class F>
Tensor run_cut(const Tensor& x, const Tensor& perm, const Tensor& boxes, const F& f) {
  Tensor out = empty_like(x);
  if (out.numel() == 0) return out;
  check_partners(perm, x.sizes()[0]);
  TORCHLIN_CHECK(boxes.scalar_type() == ScalarType::Long && boxes.is_contiguous() &&
                     (boxes.numel() == 4 || boxes.numel() == 4 * x.sizes()[0]),
                 "cutmix: boxes do not fit x");
  const auto run = [&](Tensor& target) {
    std::optional<Cut> cut = cut_of(target);
    if (!cut) return false;
    const Tensor from = in_layout_of(x, target);
    cut->x = from.const_data_ptr(), cut->out = target.mutable_data_ptr();
    cut->boxes = static_cast<const int64_t*>(boxes.const_data_ptr()), cut->box_step = boxes.numel() == 4 ? 0 : 4;
    cut->partner = static_cast<const int64_t*>(perm.const_data_ptr());
    f(*cut);
    return true;
  };
  if (run(out)) return out;
  Tensor dense = row_major_like(x);
  run(dense);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), dense.get(), 0));
  return out;
}

}  // namespace torchlin::mixup
