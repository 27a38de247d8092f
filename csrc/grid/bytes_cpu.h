// Grids of up to 256 points whose coordinates are 16-bit multiples of a power of two, as those of torchlin.quant are, on
// AVX-512 with VBMI: a coordinate is two bytes, and byte permutes look one of them up for 64 codes at once.
//
// A step is 16 lanes of 4 codes; x and weights lie in the order of permute_cpu.h.

#if TORCHLIN_ISA_BYTES == 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vbmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c,bmi,bmi2")
#endif

// As unroll, which is compiled without VBMI and so cannot take in what has it.
template <int N, class F>
TORCHLIN_INLINE void each(F&& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(N - 1);
  }
}

inline constexpr int kByteGroup = 4, kByteCodes = 64;  // of a lane, of a step

inline bool byte_kernels_run() {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  return vbmi;
}

// The power of two that every coordinate is a 16-bit multiple of, or 0.
inline float fixed_point_unit(const float* grid, int64_t size) {
  V<float> most = {};
  for (int64_t i = 0; i < size; i += kW) {
    const V<float> v = load_n(grid + i, std::min<int64_t>(kW, size - i)), positive = v < 0 ? -v : v;
    most = positive <= most ? most : positive;  // NaN stays
  }
  float largest = 0;
  for (int l = 0; l < kW; ++l) largest = most[l] <= largest ? largest : most[l];
  if (!(largest > 0x1p-60f && largest < 0x1p60f)) return 0;
  int exponent;
  std::frexp(largest, &exponent);
  const float unit = std::ldexp(1.0f, exponent - 15), inverse = 1 / unit;
  V<int32_t> differs = {};
  for (int64_t i = 0; i < size; i += kW) {
    const V<float> v = load_n(grid + i, std::min<int64_t>(kW, size - i)) * inverse;
    differs |= __builtin_convertvector(__builtin_convertvector(v, V<int32_t>), V<float>) != v;
  }
  for (int l = 0; l < kW; ++l) {
    if (differs[l] != 0) return 0;
  }
  return unit;
}

// 64 points a table; lower bytes and upper bytes of each coordinate: [coordinate][lower, upper][table][64].
constexpr int64_t byte_tables(int64_t n) { return n <= 64 ? 1 : n <= 128 ? 2 : 4; }

inline void fill_byte_tables(const float* grid, int64_t n, int64_t p, float unit, uint8_t* tables) {
  const int64_t plane = byte_tables(n) * 64;
  const float inverse = 1 / unit;
  std::memset(tables, 0, static_cast<size_t>(2 * p * plane));
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t q = 0; q < p; ++q) {
      const int value = static_cast<int>(grid[c * p + q] * inverse);
      tables[2 * q * plane + c] = static_cast<uint8_t>(value);
      tables[(2 * q + 1) * plane + c] = static_cast<uint8_t>(value >> 8);
    }
  }
}

// Codes of a step as bytes: they are bytes (n = 256), or have `width` bits each, or two share a word of at most 16 bits.
class ByteCodes {
 public:
  static bool reads(grid::Layout layout) {
    return layout.digits == 1 ? layout.width <= 8 : layout.digits == 2 && layout.width <= 16;
  }

  explicit ByteCodes(const grid::Weight& w) : digits_(w.n == 256 ? 0 : w.layout.digits) {
    const int width = w.layout.width;
    bytes_ = kByteCodes / w.layout.digits * width / 8;
    alignas(64) uint8_t places[64], shifts[64];
    for (int qword = 0; qword < 8; ++qword) {
      // Eight codes begin at a byte; four words of an odd width perhaps in the middle of one, and still end in its eighth.
      const int bit = 8 / w.layout.digits * width * qword;
      for (int i = 0; i < 8; ++i) {
        places[8 * qword + i] = static_cast<uint8_t>(bit / 8 + i);
        shifts[8 * qword + i] = static_cast<uint8_t>(bit % 8 + (digits_ == 2 ? i / 2 * width + i % 2 * 8 : i * width));
      }
    }
    places_ = _mm512_load_si512(places);
    shifts_ = _mm512_load_si512(shifts);
    const int n = static_cast<int>(w.n);
    mask_ = digits_ == 2 ? _mm512_set1_epi16(static_cast<int16_t>((1 << width) - 1)) : _mm512_set1_epi8(static_cast<int8_t>((1 << width) - 1));
    last_ = digits_ == 2 ? _mm512_set1_epi16(static_cast<int16_t>(n - 1)) : _mm512_set1_epi8(static_cast<int8_t>(n - 1));
    // Division by n: exact for words of the 38 layouts that have two digits in 16 bits (tests/test_grid_kernels_cpu.py).
    int power = 0;
    while (n >> (power + 1) != 0) ++power;
    inverse_ = _mm512_set1_epi16(static_cast<int16_t>(((1 << (16 + power)) + n - 1) / n));
    power_ = _mm_cvtsi32_si128(power);
    points_ = _mm512_set1_epi16(static_cast<int16_t>(n));
  }

  int64_t step_bytes() const { return bytes_; }

  // Lane l has codes 4 l, 4 l + 1 of the step in its lower half of 128 bits, 4 l + 2, 4 l + 3 in the upper: see byte_points.
  TORCHLIN_INLINE __m512i at(const uint8_t* p, const uint8_t* end) const {
    const int64_t rest = end - p;
    const __mmask64 there = rest >= 64 ? ~uint64_t{0} : rest > 0 ? (uint64_t{1} << rest) - 1 : 0;
    __m512i codes = _mm512_maskz_loadu_epi8(there, p);
    if (digits_ != 0) {
      codes = _mm512_maskz_multishift_epi64_epi8(~uint64_t{0}, shifts_, _mm512_maskz_permutexvar_epi8(~uint64_t{0}, places_, codes));
      codes = _mm512_and_si512(codes, mask_);
      if (digits_ == 1) {
        codes = _mm512_maskz_min_epu8(~uint64_t{0}, codes, last_);
      } else {
        const __m512i high = _mm512_srl_epi16(_mm512_mulhi_epu16(codes, inverse_), power_);
        const __m512i low = _mm512_sub_epi16(codes, _mm512_mullo_epi16(high, points_));
        codes = _mm512_or_si512(low, _mm512_slli_epi16(_mm512_maskz_min_epu16(~uint32_t{0}, high, last_), 8));
      }
    }
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm512_shuffle_epi8(codes, _mm512_maskz_broadcast_i32x4(kAll, order));
  }

 private:
  int digits_;  // 0: bytes
  int64_t bytes_;
  __m512i places_, shifts_, mask_, last_, inverse_, points_;
  __m128i power_;
};

template <int Tables>
TORCHLIN_INLINE __m512i look_up_bytes(const uint8_t* table, __m512i codes, const __mmask64* of) {
  __m512i v = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, codes, _mm512_loadu_si512(table));
  if constexpr (Tables > 1) v = _mm512_mask_permutexvar_epi8(v, of[0], codes, _mm512_loadu_si512(table + 64));
  if constexpr (Tables > 2) {
    v = _mm512_mask_permutexvar_epi8(v, of[1], codes, _mm512_loadu_si512(table + 128));
    v = _mm512_mask_permutexvar_epi8(v, of[2], codes, _mm512_loadu_si512(table + 192));
  }
  return v;
}

// f(j, q, coordinate q of code j of every lane), in units of 2^-16 of the grid's unit.
template <int Tables, int P, class F>
TORCHLIN_INLINE void byte_points(const uint8_t* tables, __m512i codes, F f) {
  __mmask64 of[3] = {};  // which table a code is in
  const __mmask64 upper = _mm512_movepi8_mask(codes), odd = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
  if constexpr (Tables == 2) of[0] = odd;
  if constexpr (Tables == 4) of[0] = odd & ~upper, of[1] = upper & ~odd, of[2] = upper & odd;
  each<P>([&](int q) __attribute__((always_inline)) {
    const __m512i low = look_up_bytes<Tables>(tables + 2 * q * Tables * 64, codes, of);
    const __m512i high = look_up_bytes<Tables>(tables + (2 * q + 1) * Tables * 64, codes, of);
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    const auto give = [&](int j, __m512i words) __attribute__((always_inline)) {
      f(j, q, __builtin_convertvector((V<int32_t>)words, V<float>));
    };
    const __m512i upper_words = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    give(0, _mm512_slli_epi32(first, 16));
    give(1, _mm512_and_si512(first, upper_words));
    give(2, _mm512_slli_epi32(second, 16));
    give(3, _mm512_and_si512(second, upper_words));
  });
}

// As permute_gemv.
template <int Tables, int P>
void byte_gemv(const grid::Linear& job, const grid::PermutePlan& plan, float* y, int64_t begin, int64_t end) {
  constexpr int R = 2, G = kByteGroup;
  const grid::Weight& w = job.weight;
  const ByteCodes codes(w);
  const uint8_t* last = w.packed + w.out * w.row_bytes;
  const float unit = plan.unit * 0x1p-16f;
  const int64_t room = w.blocks + kW;
  float* scales = grid::Scratch::get<float>(grid::Purpose::kScales, R * room);
  for (int64_t r = begin; r < end; r += R) {
    const uint8_t* from[R];
    for (int i = 0; i < R; ++i) {
      const int64_t row = std::min(r + i, end - 1);
      from[i] = w.packed + row * w.row_bytes;
      for (int64_t b = 0; b < w.blocks; ++b) scales[i * room + b] = scale_at(w, row, b) * unit;
    }
    V<float> totals[R] = {}, sums[R][2] = {};
    const float* x = job.ready;
    for (int64_t s = 0; s < plan.steps; ++s, x += G * P * kW) {
      each<R>([&](int i) __attribute__((always_inline)) {
        const uint8_t* p = from[i] + s * codes.step_bytes();
        __builtin_prefetch(p + R * w.row_bytes);
        byte_points<Tables, P>(plan.tables, codes.at(p, last), [&](int j, int q, V<float> point) __attribute__((always_inline)) {
          sums[i][j % 2] += point * load(x + (j * P + q) * kW);
        });
        if (plan.first != nullptr) {
          totals[i] += (sums[i][0] + sums[i][1]) * lane_scales(plan, s, scales + i * room);
          sums[i][0] = sums[i][1] = V<float>{};
        }
      });
    }
    for (int i = 0; i < R && r + i < end; ++i) {
      y[r + i] = plan.first != nullptr ? sum_lanes(totals[i]) : sum_lanes(sums[i][0] + sums[i][1]) * scales[i * room];
    }
  }
}

// As permute_weights.
template <int Tables, int P>
void byte_weights(const grid::Weight& w, const grid::PermutePlan& plan, int64_t row, int64_t rows, int64_t first, int64_t last,
                  float* weights, int64_t stride) {
  const ByteCodes codes(w);
  const uint8_t* end = w.packed + w.out * w.row_bytes;
  const float unit = plan.unit * 0x1p-16f;
  for (int64_t r = row; r < row + rows; ++r, weights += stride) {
    const uint8_t* from = w.packed + r * w.row_bytes;
    V<float> scale = splat(w.blocks > 0 ? scale_at(w, r, 0) * unit : 0.f);
    float* to = weights;
    for (int64_t s = first; s < last; ++s, to += kByteGroup * P * kW) {
      if (plan.first != nullptr) scale = row_scales(w, plan, r, s) * unit;
      const uint8_t* p = from + s * codes.step_bytes();
      __builtin_prefetch(p + rows * w.row_bytes);
      byte_points<Tables, P>(plan.tables, codes.at(p, end), [&](int j, int q, V<float> point) __attribute__((always_inline)) {
        store(to + (j * P + q) * kW, point * scale);
      });
    }
  }
}

template <int Tables, int P>
constexpr PermuteKernel byte_kernel_of() {
  return {0, P, kByteGroup, &byte_gemv<Tables, P>, &byte_weights<Tables, P>};
}
#define TORCHLIN_BYTE_KERNELS(tables) \
  {byte_kernel_of<tables, 1>(), byte_kernel_of<tables, 2>(), byte_kernel_of<tables, 3>(), byte_kernel_of<tables, 4>()}
inline constexpr PermuteKernel kByteKernels[3][4] = {TORCHLIN_BYTE_KERNELS(1), TORCHLIN_BYTE_KERNELS(2), TORCHLIN_BYTE_KERNELS(4)};
#undef TORCHLIN_BYTE_KERNELS

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // TORCHLIN_ISA_BYTES == 64
