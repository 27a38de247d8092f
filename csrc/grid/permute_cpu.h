// Small grids whose codes are whole bits, n = 4, 8, 16, 32 and (AVX-512) 64: the points stay in registers, and a permute looks up
// one coordinate of a vector of codes.
//
// A step is W lanes of G codes: lane l holds codes l G .. l G + G - 1 of the step in its low bits, so that code j of every lane
// is a shift away, and nothing has to be masked: permutes read the low bits of an index only. x lies in the order in which
// the codes come out, [step][j][coordinate][lane]; so do weights that are made for several rows of x.

inline constexpr int kW = kLanes<float>;

template <int Bits>
inline constexpr int kGroup = Bits == 5 || Bits == 6 ? 4 : Bits == 3 ? 8 : 16 / Bits * 2;  // codes of a lane
template <int Bits>
inline constexpr int kStepBytes = kW * kGroup<Bits> * Bits / 8;

// ---- the codes of a step

#if TORCHLIN_ISA_BYTES >= 32

// Byte i of 8 lanes, a quarter of the step after another: where it comes from in the 16 bytes that begin at (or, for an odd
// number of words, in) the quarter's first word.
template <int Bits>
TORCHLIN_INLINE V<int32_t> spread(const uint8_t* p) {
  constexpr int kLaneBits = kGroup<Bits> * Bits;  // 24, or 20
  constexpr int a = kLaneBits / 8, b = 2 * kLaneBits / 8, c = 3 * kLaneBits / 8;
#define TORCHLIN_QUARTER 0, 1, 2, 3, a, a + 1, a + 2, a + 3, b, b + 1, b + 2, b + 3, c, c + 1, c + 2, c + 3
#if TORCHLIN_ISA_BYTES == 64
  constexpr int w = 4 * kLaneBits / 16;  // 16-bit words of a quarter
#define TORCHLIN_WORDS(at) at, at + 1, at + 2, at + 3, at + 4, at + 5, at + 6, at + 7
  typedef int16_t words __attribute__((vector_size(64)));
  typedef int8_t bytes __attribute__((vector_size(64)));
  const words quarters = {TORCHLIN_WORDS(0), TORCHLIN_WORDS(w), TORCHLIN_WORDS(2 * w), TORCHLIN_WORDS(3 * w)};
  const bytes places = {TORCHLIN_QUARTER, TORCHLIN_QUARTER, TORCHLIN_QUARTER, TORCHLIN_QUARTER};
#undef TORCHLIN_WORDS
  const __m512i moved = _mm512_maskz_permutexvar_epi16(0xffffffffu, (__m512i)quarters, _mm512_loadu_si512(p));
  V<int32_t> lanes = (V<int32_t>)_mm512_shuffle_epi8(moved, (__m512i)places);
#else
  typedef int8_t bytes __attribute__((vector_size(32)));
  const bytes places = {TORCHLIN_QUARTER, TORCHLIN_QUARTER};
  const __m256i moved = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * kLaneBits / 8)), 1);
  V<int32_t> lanes = (V<int32_t>)_mm256_shuffle_epi8(moved, (__m256i)places);
#endif
#undef TORCHLIN_QUARTER
  if constexpr (kLaneBits % 8 != 0) {
    V<int32_t> odd;
    for (int i = 0; i < kW; ++i) odd[i] = i % 2 * 4;
    lanes = lanes >> odd;
  }
  return lanes;
}

inline constexpr int kReadBytes = TORCHLIN_ISA_BYTES;  // of a step, whatever its size

template <int Bits>
TORCHLIN_INLINE V<int32_t> step_codes(const uint8_t* p, const uint8_t* end) {
  alignas(64) uint8_t last[kReadBytes];
  if (__builtin_expect(end - p < kReadBytes, 0)) {
    std::memset(last, 0, sizeof last);
    if (end > p) std::memcpy(last, p, static_cast<size_t>(end - p));
    p = last;
  }
  if constexpr (Bits == 3 || Bits == 5 || Bits == 6) {
    return spread<Bits>(p);
  } else {
    V<int32_t> words;
    std::memcpy(&words, p, sizeof words);
    return words;
  }
}

// ---- one coordinate of a vector of codes

template <int Bits>
inline constexpr int kTables = (1 << Bits) <= kW ? 1 : (1 << Bits) / kW;

template <int Bits>
TORCHLIN_INLINE V<float> look_up(const V<float>* table, V<int32_t> code) {
#if TORCHLIN_ISA_BYTES == 64
  const __m512i i = (__m512i)code;
  if constexpr (kTables<Bits> == 1) {
    return (V<float>)_mm512_maskz_permutexvar_ps(kAll, i, (__m512)table[0]);
  } else {
    const __m512 low = _mm512_permutex2var_ps((__m512)table[0], i, (__m512)table[1]);
    if constexpr (kTables<Bits> == 2) return (V<float>)low;
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    return (V<float>)_mm512_mask_blend_ps(upper, low, _mm512_permutex2var_ps((__m512)table[2], i, (__m512)table[3]));
  }
#else
  const __m256i i = (__m256i)code;
  const __m256 low = _mm256_permutevar8x32_ps((__m256)table[0], i);
  if constexpr (kTables<Bits> == 1) return (V<float>)low;
  const __m256 bit3 = (__m256)(code << 28);  // a blend looks at the sign
  const __m256 first = _mm256_blendv_ps(low, _mm256_permutevar8x32_ps((__m256)table[1], i), bit3);
  if constexpr (kTables<Bits> == 2) return (V<float>)first;
  const __m256 second = _mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)table[2], i),
                                         _mm256_permutevar8x32_ps((__m256)table[3], i), bit3);
  return (V<float>)_mm256_blendv_ps(first, second, (__m256)(code << 27));
#endif
}

template <int Bits, int P>
struct PointTables {
  V<float> of[P][kTables<Bits>];
  explicit TORCHLIN_INLINE PointTables(const grid::Weight& w) {
    for (int q = 0; q < P; ++q) {
      for (int i = 0; i < kTables<Bits> * kW; ++i) of[q][i / kW][i % kW] = w.grid[i % (1 << Bits) * P + q];
    }
  }
};

// ---- scales of a step

// Lane l takes its block's out of a row's scales, which have room for a vector more.
TORCHLIN_INLINE V<float> lane_scales(const grid::PermutePlan& plan, int64_t step, const float* scales) {
  V<int32_t> lane;
  std::memcpy(&lane, plan.lane + step * kW, sizeof lane);
  const V<float> near = load(scales + plan.first[step]);
#if TORCHLIN_ISA_BYTES == 64
  return (V<float>)_mm512_maskz_permutexvar_ps(kAll, (__m512i)lane, (__m512)near);
#else
  return (V<float>)_mm256_permutevar8x32_ps((__m256)near, (__m256i)lane);
#endif
}

inline V<float> row_scales(const grid::Weight& w, const grid::PermutePlan& plan, int64_t row, int64_t step) {
  V<float> scale;
  for (int l = 0; l < kW; ++l) {
    scale[l] = scale_at(w, row, std::min(int64_t{plan.first[step]} + plan.lane[step * kW + l], w.blocks - 1));
  }
  return scale;
}

// ---- one row of x

// Rows [begin, end) of y, four at a time, that their chains of sums overlap. Scales of a step are `scales + first[step]`, lane l
// taking number lane[step * W + l]; without `first` there is one for the row.
template <int Bits, int P>
void permute_gemv(const grid::Linear& job, const grid::PermutePlan& plan, float* y, int64_t begin, int64_t end) {
  constexpr int R = 4, G = kGroup<Bits>;
  const grid::Weight& w = job.weight;
  const PointTables<Bits, P> tables(w);
  const uint8_t* last = w.packed + w.out * w.row_bytes;
  const int64_t room = w.blocks + kW;
  float* scales = grid::Scratch::get<float>(grid::Purpose::kScales, R * room);
  for (int64_t r = begin; r < end; r += R) {
    const uint8_t* from[R];
    for (int i = 0; i < R; ++i) {
      const int64_t row = std::min(r + i, end - 1);
      from[i] = w.packed + row * w.row_bytes;
      for (int64_t b = 0; b < w.blocks; ++b) scales[i * room + b] = scale_at(w, row, b);
    }
    V<float> totals[R] = {}, sums[R] = {};
    const float* x = job.ready;
    for (int64_t s = 0; s < plan.steps; ++s) {
      V<int32_t> codes[R];
      unroll<R>([&](int i) __attribute__((always_inline)) {
        codes[i] = step_codes<Bits>(from[i] + s * kStepBytes<Bits>, last);
        __builtin_prefetch(from[i] + s * kStepBytes<Bits> + R * w.row_bytes);  // a row is too short for the hardware to notice
      });
      unroll<G>([&](int j) __attribute__((always_inline)) {
        unroll<P>([&](int q) __attribute__((always_inline)) {
          const V<float> xv = load(x + (j * P + q) * kW);
          unroll<R>([&](int i) __attribute__((always_inline)) {
            sums[i] += look_up<Bits>(tables.of[q], codes[i] >> (j * Bits)) * xv;
          });
        });
      });
      x += G * P * kW;
      if (plan.first != nullptr) {
        unroll<R>([&](int i) __attribute__((always_inline)) {
          totals[i] += sums[i] * lane_scales(plan, s, scales + i * room);
          sums[i] = V<float>{};
        });
      }
    }
    for (int i = 0; i < R && r + i < end; ++i) {
      y[r + i] = plan.first != nullptr ? sum_lanes(totals[i]) : sum_lanes(sums[i]) * scales[i * room];
    }
  }
}

// Steps [first, last) of some rows as weights, in the order of x.
template <int Bits, int P>
void permute_weights(const grid::Weight& w, const grid::PermutePlan& plan, int64_t row, int64_t rows, int64_t first, int64_t last,
                     float* weights, int64_t stride) {
  constexpr int G = kGroup<Bits>;
  const PointTables<Bits, P> tables(w);
  const uint8_t* end = w.packed + w.out * w.row_bytes;
  for (int64_t r = row; r < row + rows; ++r, weights += stride) {
    const uint8_t* from = w.packed + r * w.row_bytes;
    V<float> scale = splat(w.blocks > 0 ? scale_at(w, r, 0) : 0.f);
    float* to = weights;
    for (int64_t s = first; s < last; ++s) {
      if (plan.first != nullptr) scale = row_scales(w, plan, r, s);
      const V<int32_t> codes = step_codes<Bits>(from + s * kStepBytes<Bits>, end);
      __builtin_prefetch(from + s * kStepBytes<Bits> + rows * w.row_bytes);
      unroll<G>([&](int j) __attribute__((always_inline)) {
        unroll<P>([&](int q) __attribute__((always_inline)) {
          store(to, look_up<Bits>(tables.of[q], codes >> (j * Bits)) * scale);
          to += kW;
        });
      });
    }
  }
}

struct PermuteKernel {
  int bits, p, group;
  void (*gemv)(const grid::Linear&, const grid::PermutePlan&, float* y, int64_t begin, int64_t end);
  void (*weights)(const grid::Weight&, const grid::PermutePlan&, int64_t row, int64_t rows, int64_t first, int64_t last,
                  float* weights, int64_t stride);
};

template <int Bits, int P>
constexpr PermuteKernel permute_kernel_of() {
  return {Bits, P, kGroup<Bits>, &permute_gemv<Bits, P>, &permute_weights<Bits, P>};
}
#define TORCHLIN_PERMUTES(bits) \
  permute_kernel_of<bits, 1>(), permute_kernel_of<bits, 2>(), permute_kernel_of<bits, 3>(), permute_kernel_of<bits, 4>()
inline constexpr PermuteKernel kPermutes[] = {
    TORCHLIN_PERMUTES(2), TORCHLIN_PERMUTES(3), TORCHLIN_PERMUTES(4), TORCHLIN_PERMUTES(5),
#if TORCHLIN_ISA_BYTES == 64
    TORCHLIN_PERMUTES(6),
#endif
};
#undef TORCHLIN_PERMUTES

#endif  // TORCHLIN_ISA_BYTES >= 32
