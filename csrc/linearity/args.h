// The raw ops' arguments, checked and taken apart: the same for every device. Python has refused bad input by name before.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

#include "core/op.h"
#include "core/tensor.h"
#include "linearity/job.h"

namespace torchlin::linearity {

using OptionalTensor = std::optional<Tensor>;

// Reduction, as Python numbers it.
enum class Reduction : int64_t { none, mean, sum };

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes.begin()[1], 1);
  return empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data());
}

// A job and what it points to.
struct Arguments {
  Job job{};
  Reduction reduction{};
  std::array<std::optional<Tensor>, 10> kept;  // copies of what had other strides
  int count = 0;

  Arguments(const Tensor& a, const Tensor& target, const Tensor& mix, const OptionalTensor& b, const OptionalTensor& c,
            const OptionalTensor& others, const OptionalTensor& lam, const OptionalTensor& weight, double smoothing,
            int64_t ignore_index, int64_t penalty, double beta, int64_t how)
      : reduction(static_cast<Reduction>(how)), like(a) {
    TORCHLIN_CHECK(a.dim() == 2 && b.has_value() == c.has_value() && (b || a.size(0) % 3 == 0) && a.size(1) >= 1,
                   "linearity: logits must be (3B, K) or three (B, K), K >= 1");
    TORCHLIN_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double,
                   "linearity: expected float32 or float64 logits");
    const int64_t rows = a.size(0), k = a.size(1), samples = b ? rows : rows / 3;
    job.samples = samples, job.classes = k;
    const Tensor* points[] = {&a, b ? &*b : &a, c ? &*c : &a};
    for (int t = 0; t < 3; ++t) {
      const Tensor& z = *points[t];
      TORCHLIN_CHECK(same_type(z) && z.dim() == 2 && z.size(0) == rows && z.size(1) == k, "linearity: logits differ");
      if (t > 0 && !b) {
        job.row_step[t] = job.row_step[0];
        job.logits[t] = static_cast<const char*>(job.logits[0]) + t * samples * job.row_step[0] * element();
        continue;
      }
      const Tensor& packed = k == 1 || z.stride(1) == 1 ? z : keep(contiguous(z));
      job.logits[t] = packed.const_data_ptr(), job.row_step[t] = packed.stride(0);
    }
    if (target.scalar_type() == ScalarType::Long) {
      job.labels = static_cast<const int64_t*>(one_a_sample(target, nullptr));
      TORCHLIN_CHECK(others.has_value() == lam.has_value(), "linearity: second labels come with their share");
      if (others) {
        TORCHLIN_CHECK(others->scalar_type() == ScalarType::Long && same_type(*lam), "linearity: labels or lam of another type");
        job.others = static_cast<const int64_t*>(one_a_sample(*others, nullptr));
        job.lam = one_a_sample(*lam, &job.lam_step);
      }
    } else {
      TORCHLIN_CHECK(same_type(target) && target.dim() == 2 && target.size(0) == samples && target.size(1) == k && !others,
                     "linearity: soft targets must be (B, K) of the logits' type");
      job.dense = (target.is_contiguous() ? target : keep(contiguous(target))).const_data_ptr();
    }
    TORCHLIN_CHECK(same_type(mix), "linearity: mix of another type");
    job.mix = one_a_sample(mix, &job.mix_step);
    if (weight) {
      TORCHLIN_CHECK(same_type(*weight) && weight->dim() == 1 && weight->size(0) == k, "linearity: weight must be (K,)");
      job.weight = (weight->is_contiguous() ? *weight : keep(contiguous(*weight))).const_data_ptr();
    }
    TORCHLIN_CHECK(penalty >= 0 && penalty <= 2 && how >= 0 && how <= 2 && beta > 0, "linearity: no such penalty or reduction");
    job.smoothing = smoothing, job.ignore_index = ignore_index;
    job.penalty = static_cast<Penalty>(penalty), job.beta = beta, job.scale = 1;
  }

  bool same_type(const Tensor& t) const {
    return t.scalar_type() == like.scalar_type() && t.get_device_index() == like.get_device_index();
  }
  int64_t element() const { return like.scalar_type() == ScalarType::Double ? 8 : 4; }

  // (samples,), or with `step` one element for all of them.
  const void* one_a_sample(const Tensor& t, int64_t* step) {
    const bool single = step != nullptr && t.dim() == 0;
    TORCHLIN_CHECK(single || (t.dim() == 1 && t.size(0) == job.samples), "linearity: expected one element a sample");
    if (single) {
      *step = 0;
      return t.const_data_ptr();
    }
    if (step != nullptr) *step = 1;
    return (job.samples < 2 || t.stride(0) == 1 ? t : keep(contiguous(t))).const_data_ptr();
  }
  void set_gradients(const OptionalTensor& grad_value, const OptionalTensor& grad_losses) {
    if (grad_value) {
      TORCHLIN_CHECK(same_type(*grad_value) && grad_value->dim() == (reduction == Reduction::none ? 1 : 0),
                     "linearity: grad_value does not fit");
      job.grad_value = one_a_sample(*grad_value, &job.grad_value_step);
    }
    if (grad_losses) {
      TORCHLIN_CHECK(same_type(*grad_losses) && grad_losses->dim() == 2 && grad_losses->size(0) == 3 &&
                         grad_losses->size(1) == job.samples,
                     "linearity: grad_losses must be (3, B)");
      job.grad_losses = (grad_losses->is_contiguous() ? *grad_losses : keep(contiguous(*grad_losses))).const_data_ptr();
    }
  }
  Tensor value() const { return reduction == Reduction::none ? make(like, {job.samples}) : make(like, {}); }
  Tensor losses() const { return make(like, {3, job.samples}); }
  Tensor dlogits() const { return make(like, {3 * job.samples, job.classes}); }
  Tensor dmix() const { return make(like, {job.samples}); }

  static Tensor contiguous(const Tensor& t) {
    std::array<int64_t, 2> strides{1, 1};
    if (t.dim() == 2) strides[0] = std::max<int64_t>(t.size(1), 1);
    Tensor copy = empty_strided(t, t.dim(), t.sizes().data(), strides.data());
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
    return copy;
  }

 private:
  const Tensor& keep(Tensor t) { return *(kept[count++] = std::move(t)); }
  const Tensor& like;
};

inline void check_scale(const Tensor& rows, const Tensor& by) {
  const ScalarType dtype = rows.scalar_type();
  TORCHLIN_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && dtype == by.scalar_type(),
                 "linearity: expected float32 or float64 rows");
  TORCHLIN_CHECK(rows.is_contiguous() && rows.dim() == 2 && rows.size(0) % 3 == 0 &&
                     (by.dim() == 0 || (by.dim() == 1 && by.size(0) == rows.size(0) / 3)),
                 "linearity: expected rows (3B, K) and one factor a sample");
}

#define TORCHLIN_LINEARITY_PARAMETERS                                                                                    \
  const Tensor &a, const Tensor &target, const Tensor &mix, const OptionalTensor &b, const OptionalTensor &c,              \
      const OptionalTensor &others, const OptionalTensor &lam, const OptionalTensor &weight, double smoothing,             \
      int64_t ignore_index, int64_t penalty, double beta, int64_t reduction
#define TORCHLIN_LINEARITY_ARGUMENTS \
  a, target, mix, b, c, others, lam, weight, smoothing, ignore_index, penalty, beta, reduction

}  // namespace torchlin::linearity
