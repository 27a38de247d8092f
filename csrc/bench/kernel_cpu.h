// Additions or FMAs in 12 independent chains: as many as hide the latency of two units, and stay in 16 registers.
template <class Step>
TORCHLIN_INLINE double chains(int64_t floats, const Step& step) {
  constexpr int kChains = 12;
  V<float> sums[kChains];
  unroll<kChains>([&](int j) { sums[j] = splat(static_cast<float>(j)); });
  for (int64_t i = 0; i < floats; i += kChains * kLanes<float>) {
    unroll<kChains>([&](int j) { sums[j] = step(sums[j]); });
  }
  V<float> total{};
  unroll<kChains>([&](int j) { total += sums[j]; });
  return total[0];
}

inline double additions(int64_t floats) {
  V<float> one = splat(1.0f);
  opaque(one);
  return chains(floats, [&](const V<float>& sum) __attribute__((always_inline)) { return sum + one; });
}

inline double fmas(int64_t floats) {
  V<float> one = splat(1.0f);
  opaque(one);
  return chains(floats, [&](const V<float>& sum) __attribute__((always_inline)) { return sum * one + one; });
}
