// Philox over lanes: a word of the counter is the low half of a 64-bit lane, which is what the multiplier reads; the high halves
// hold leftovers. Included inside a level's namespace.

using U = V<uint64_t>;

TORCHLIN_INLINE U low_product(U a, uint32_t m) {  // of the low halves
  const U b = splat(static_cast<uint64_t>(m));
#if TORCHLIN_ISA_BYTES == 64
  return (U)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif TORCHLIN_ISA_BYTES == 32
  return (U)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * b;
#endif
}

TORCHLIN_INLINE U xor3(U a, U b, U c) {
#if TORCHLIN_ISA_BYTES == 64
  return (U)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

struct Counters {
  U w[4];
};

TORCHLIN_INLINE Counters philox(U element, uint32_t pair, const triplet::Keys& keys) {
  U c0 = element, c1 = element >> 32, c2 = splat(uint64_t{pair}), c3 = splat(uint64_t{triplet::kNoise});
  unroll<triplet::kRounds>([&](int r) __attribute__((always_inline)) {
    const U p0 = low_product(c0, triplet::kMultiplier0), p1 = low_product(c2, triplet::kMultiplier1);
    c0 = xor3(p1 >> 32, c1, splat(uint64_t{keys.k[r][0]})), c1 = p1;
    c2 = xor3(p0 >> 32, c3, splat(uint64_t{keys.k[r][1]})), c3 = p0;
  });
  return {{c0, c1, c2, c3}};
}

// The low halves of two vectors, one after the other in turn.
TORCHLIN_INLINE V<int32_t> interleave(U even, U odd) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<int32_t>)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif TORCHLIN_ISA_BYTES == 32
  return (V<int32_t>)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
  return (V<int32_t>)((even & 0xffffffff) | odd << 32);
#endif
}
