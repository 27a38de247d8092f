// The 16-bit float types as kernels see them: bits, and exact scalar conversions for where there is no instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace torchlin {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(bf16 h) { return bits_float(static_cast<uint32_t>(h.bits) << 16); }

// Round to nearest even; a NaN stays a NaN (quiet, sign kept).
inline bf16 to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  // Move exponent and mantissa into place and let one exact multiplication rebias, subnormals included.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline f16 to_f16(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000) {
    h = 0x7c00;  // 2^16 and more; what lies between 65504 and 2^16 rounds below
  } else if (magnitude >= 0x38800000) {
    h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {
    // Subnormal: adding 0.5 makes the FPU round to a multiple of 2^-24.
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace torchlin
