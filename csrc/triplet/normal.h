// The constants of normal numbers, and the ones in double; every processor's kernels share them.
#pragma once

#include <cmath>
#include <cstdint>

#include "triplet/philox.h"

namespace torchlin::triplet {

// c[0] + z (c[1] + ...); by value from functions, since a device has no constants of the host.
template <int N>
struct Series {
  float c[N];
};

// log(1 + f) = f + f^2 L(f) for f in [-1/3, 1/3]: csrc/simd/math.h has the same.
TORCHLIN_HOST_DEVICE constexpr Series<9> log_series() {
  return {{-5.000000000e-01f, 3.333321214e-01f, -2.499983162e-01f, 2.001057714e-01f, -1.667896211e-01f, 1.400353312e-01f,
           -1.220517159e-01f, 1.399444193e-01f, -1.280185133e-01f}};
}
inline constexpr float kLn2High = 0.693115234375f, kLn2Low = 3.1946335e-05f;  // the first has few bits: products are exact

// sin(pi r) = r S(r^2) and cos(pi r) = C(r^2) for |r| <= 1/4: errors below 3e-8 and 5e-10.
TORCHLIN_HOST_DEVICE constexpr Series<4> sine_series() {
  return {{3.141592741e+00f, -5.167732716e+00f, 2.550776958e+00f, -5.995358229e-01f}};
}
TORCHLIN_HOST_DEVICE constexpr Series<5> cosine_series() {
  return {{1.0f, -4.934802055e+00f, 4.058696747e+00f, -1.334758162e+00f, 2.289884984e-01f}};
}

TORCHLIN_HOST_DEVICE inline void normal_pair(uint32_t a, int32_t b, double& x, double& y) {
  const double radius = sqrt(-2 * log(static_cast<double>(a >> 1 | 1) * 0x1p-31));
  const double turn = static_cast<double>(b | 1) * 0x1p-31;  // in half turns
#if defined(__CUDA_ARCH__)
  x = radius * cospi(turn), y = radius * sinpi(turn);  // the others keep a table on the stack, for arguments that are large
#else
  x = radius * cos(turn * 3.14159265358979323846), y = radius * sin(turn * 3.14159265358979323846);
#endif
}

}  // namespace torchlin::triplet
