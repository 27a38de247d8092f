// A parallel loop that costs nothing for small work: below one grain it is a plain call, no region is opened.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace torchlin {

// f(begin, end) over [0, n) in chunks of at least `grain`. f must not throw: it runs on other threads behind a C boundary.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&f))));
}

inline int64_t num_threads() {
  uint32_t n = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&n));
  return n;
}

}  // namespace torchlin
