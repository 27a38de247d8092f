// Allocation and dtype switch. Outputs are made through the C shim: torch::stable::empty_like looks an operator up by name
// on every call, which costs several times the allocation itself.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/huge_pages.h"
#include "core/op.h"

namespace torchlin {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// What arithmetic is done in: 16-bit types compute in float, double in double.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct type_tag {
  using type = T;
};

// Calls f(type_tag<T>{}) with the element type of a floating tensor.
template <class F>
decltype(auto) dispatch_float(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(type_tag<float>{});
    case ScalarType::Double: return f(type_tag<double>{});
    case ScalarType::Half: return f(type_tag<Half>{});
    case ScalarType::BFloat16: return f(type_tag<BFloat16>{});
    default: TORCHLIN_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
#if defined(__GNUC__)
  __builtin_unreachable();
#endif
}

// A fresh tensor with the device and (unless given) the dtype of `like`.
inline Tensor empty_strided(const Tensor& like, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype = -1) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype < 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, &out));
#if !defined(USE_CUDA)  // the library for CUDA allocates nothing here
  if (device_type == aoti_torch_device_type_cpu()) {
    int64_t elements = 1;
    for (int64_t i = 0; i < ndim; ++i) elements *= sizes[i];
    const int64_t threshold = huge_page_threshold().load(std::memory_order_relaxed);
    if (threshold >= 0 && elements >= threshold / 8) {  // no element has more bytes
      void* data = nullptr;
      int64_t bytes = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(out, &data));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(out, &bytes));
      if (bytes >= threshold) advise_huge_pages(data, bytes);
    }
  }
#endif
  return Tensor(out);
}

inline bool is_nonoverlapping_and_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    // Size-1 dimensions say nothing about the layout: keep them out of the way.
    if ((sizes[a] < 2) != (sizes[b] < 2)) return sizes[b] < 2;
    return strides[a] < strides[b];
  });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (sizes[d] < 2) break;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// The strides of torch.empty_like(t): t's own where it is non-overlapping and dense, else dense strides in t's order of
// dimensions. The order is torch's (a stable insertion sort in which stride 0 compares equal to everything), so that what
// a compiled graph was told by the fake kernel is what it gets.
inline std::vector<int64_t> like_strides(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size());
  if (is_nonoverlapping_and_dense(t)) return {strides.data(), strides.data() + ndim};
  std::vector<int64_t> order(ndim);  // innermost first
  for (int64_t i = 0; i < ndim; ++i) order[i] = ndim - 1 - i;
  const auto compare = [&](int64_t a, int64_t b) {
    if (strides[a] == 0 || strides[b] == 0) return 0;
    if (strides[a] != strides[b]) return strides[a] < strides[b] ? -1 : 1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (int64_t i = 1; i < ndim; ++i) {
    for (int64_t moving = i, below = i - 1; below >= 0; --below) {
      const int sign = compare(order[below], order[moving]);
      if (sign < 0) break;
      if (sign == 0) continue;
      std::swap(order[below], order[moving]);
      moving = below;
    }
  }
  std::vector<int64_t> dense(ndim);
  int64_t step = 1;
  for (const int64_t d : order) {
    dense[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return dense;
}

// torch.empty_like(t), preserve_format.
inline Tensor empty_like(const Tensor& t) {
  if (t.is_contiguous()) return empty_strided(t, t.dim(), t.sizes().data(), t.strides().data());
  return empty_strided(t, t.dim(), t.sizes().data(), like_strides(t).data());
}

// t itself if it has the strides of `like`, else a copy that has. `like` comes from empty_like: it is dense.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  const auto a = t.strides(), b = like.strides();
  if (std::equal(a.begin(), a.end(), b.begin(), b.end())) return t;
  Tensor copy = empty_like(like);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

}  // namespace torchlin
