// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter at a time.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCHLIN_HOST_DEVICE __host__ __device__
#else
#define TORCHLIN_HOST_DEVICE
#endif

namespace torchlin::triplet {

inline constexpr int kRounds = 10;
inline constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

struct Words {
  uint32_t w[4];
};

// The key of every round.
struct Keys {
  uint32_t k[kRounds][2];

  TORCHLIN_HOST_DEVICE Keys(uint64_t seed = 0) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < kRounds; ++r, k0 += 0x9E3779B9, k1 += 0xBB67AE85) k[r][0] = k0, k[r][1] = k1;
  }
};

TORCHLIN_HOST_DEVICE inline Words philox(uint64_t element, uint32_t pair, uint32_t purpose, const Keys& keys) {
  uint32_t c0 = static_cast<uint32_t>(element), c1 = static_cast<uint32_t>(element >> 32), c2 = pair, c3 = purpose;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int r = 0; r < kRounds; ++r) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kMultiplier0, p1 = static_cast<uint64_t>(c2) * kMultiplier1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k[r][0], c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k[r][1], c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace torchlin::triplet
