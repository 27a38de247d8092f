// How codes of grid points are stored: `digits` codes below n are one number of `width` bits, and these numbers are a
// little-endian bit stream a row (torchlin/ops/grid_codes.py). Shared by the kernels for CPUs and GPUs.
#pragma once

#include <cstdint>

namespace torchlin::grid {

constexpr int kMostDigits = 4;

struct Layout {
  int digits = 1, width = 8;
};

// Bits of the largest number of so many digits.
constexpr int bits_of(int64_t n, int digits) {
  unsigned __int128 last = 1;  // up to 65536^4
  for (int i = 0; i < digits; ++i) last *= static_cast<uint64_t>(n);
  last -= 1;
  int bits = 0;
  for (; last != 0; last >>= 1) ++bits;
  return bits;
}

constexpr Layout layout_of(int64_t n) {
  Layout best{1, bits_of(n, 1)};
  if ((n & (n - 1)) == 0) return best;
  for (int d = 2; d <= kMostDigits; ++d) {
    const int width = bits_of(n, d);
    if (width * best.digits < best.width * d) best = {d, width};
  }
  return best;
}

constexpr int64_t row_bytes_of(Layout layout, int64_t count) {
  return ((count + layout.digits - 1) / layout.digits * layout.width + 7) / 8;
}

}  // namespace torchlin::grid
