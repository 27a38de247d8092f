// From tensors to a Job: what the CPU and CUDA sides of a call have in common.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/op.h"
#include "core/tensor.h"
#include "triplet/job.h"

namespace torchlin::triplet {

// Strides of a sample in the output: those that torch.empty_like(x[0]) has; row-major where there is no sample.
inline std::vector<int64_t> sample_strides(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size()) - 1;
  if (x.is_contiguous() || x.numel() == 0) {
    std::vector<int64_t> dense(static_cast<size_t>(ndim));
    int64_t step = 1;
    for (int64_t d = ndim; d-- > 0; step *= std::max<int64_t>(sizes[d + 1], 1)) dense[d] = step;
    return dense;
  }
  AtenTensorHandle sample = nullptr;
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), ndim, sizes.data() + 1, strides.data() + 1, offset, &sample));
  return like_strides(Tensor(sample));
}

// A fresh batch of samples of x's shape, `samples` of them, with such strides.
inline Tensor empty_batch(const Tensor& x, int64_t samples, const std::vector<int64_t>& strides) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end()), steps{1};
  for (size_t d = 1; d < shape.size(); ++d) steps[0] *= std::max<int64_t>(shape[d], 1);
  shape[0] = samples;
  steps.insert(steps.end(), strides.begin(), strides.end());
  return empty_strided(x, static_cast<int64_t>(shape.size()), shape.data(), steps.data());
}

inline bool has_strides(const Tensor& t, const std::vector<int64_t>& strides) {
  const auto sizes = t.sizes(), have = t.strides();
  for (size_t d = 0; d < strides.size(); ++d) {
    if (sizes[d + 1] > 1 && have[d + 1] != strides[d]) return false;
  }
  return true;
}

// t itself where its samples have these strides (and nothing is between them, if `dense`), else a copy.
inline Tensor with_strides(const Tensor& t, const std::vector<int64_t>& strides, bool dense = false) {
  const int64_t batch = t.sizes()[0];
  if (has_strides(t, strides) && (!dense || batch < 2 || t.strides()[0] == t.numel() / batch)) return t;
  Tensor copy = empty_batch(t, batch, strides);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

// A job, and the tensors that it points to.
struct Setup {
  Job job{};
  std::vector<int64_t> strides;
  Tensor x;
  std::optional<Tensor> eps;

  // eps_at: of the compute type, contiguous, as many dimensions as x has, each of x's size or 1.
  Setup(const Tensor& given, const std::optional<Tensor>& eps_at, bool ball, std::optional<double> low, std::optional<double> high)
      : strides(sample_strides(given)), x(with_strides(given, strides)) {
    TORCHLIN_CHECK(given.dim() > 0 && low.has_value() == high.has_value(), "triplet: bad arguments");
    const auto sizes = x.sizes();
    job.batch = sizes[0];
    job.size = 1;
    for (size_t d = 1; d < sizes.size(); ++d) job.size *= sizes[d];
    job.x = x.const_data_ptr(), job.x_step = x.strides()[0];
    job.ball = ball, job.clip = low.has_value();
    job.low = low.value_or(0), job.high = high.value_or(0);
    job.bits = length_bits(job.size, x.scalar_type() == ScalarType::Double);
    job.run = job.size;
    if (x.numel() == 0) return;
    set_dims();
    if (eps_at) set_eps(*eps_at);
  }

 private:
  // Dimensions of a sample from the outermost in memory to the innermost, merged where both orders agree.
  void set_dims() {
    const auto sizes = x.sizes();
    int64_t step = 1;
    std::vector<std::pair<int64_t, Dim>> found;  // stride in memory, and the dimension
    for (size_t d = sizes.size(); d-- > 1; step *= sizes[d]) {
      if (sizes[d] > 1) found.push_back({strides[d - 1], {sizes[d], step}});
    }
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    TORCHLIN_CHECK(found.size() <= kDims, "triplet: too many dimensions");
    for (const auto& [stride, dim] : found) {
      Dim* outer = job.ndim > 0 ? &job.dims[job.ndim - 1] : nullptr;
      if (outer != nullptr && outer->step == dim.size * dim.step) *outer = {outer->size * dim.size, dim.step};
      else job.dims[job.ndim++] = dim;
    }
    if (job.ndim == 1) job.ndim = 0;
  }

  // Neighbours that share an eps are a run; what is more irregular becomes one eps an element.
  void set_eps(const Tensor& given) {
    constexpr int64_t kShort = 64;
    const auto sizes = x.sizes(), has = given.sizes();
    TORCHLIN_CHECK(has.size() == sizes.size() && given.is_contiguous(), "triplet: eps does not fit x");
    size_t tail = sizes.size();
    int64_t run = 1, count = 1;
    while (tail > 1 && has[tail - 1] == 1) run *= sizes[--tail];
    bool regular = run == job.size || (job.ndim == 0 && (run == 1 || run >= kShort));
    for (size_t d = 1; d < tail; ++d) regular &= has[d] == sizes[d], count *= has[d];
    eps = given;
    if (!regular) {
      eps = empty_eps(given);
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(eps->get(), given.get(), 0));
      run = 1, count = job.size;
    }
    job.run = run, job.eps = eps->const_data_ptr();
    job.eps_step = has[0] == 1 ? 0 : count;
  }

  Tensor empty_eps(const Tensor& given) const {
    const auto sizes = x.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end()), steps{job.size};
    shape[0] = given.sizes()[0];
    steps.insert(steps.end(), strides.begin(), strides.end());
    return empty_strided(given, static_cast<int64_t>(shape.size()), shape.data(), steps.data());
  }
};

}  // namespace torchlin::triplet
