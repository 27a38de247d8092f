// Two normal numbers of two random words, by Box and Muller. Own polynomials (coefficients fitted for this file, errors below 3e-8),
// every product rounded before it is added to: each level, and the CUDA kernel, computes the same bits. Double serves gradient
// checks: libm, lane by lane. Included inside a level's namespace.

template <class Vec>
TORCHLIN_INLINE Vec times(Vec a, Vec b) {
  Vec p = a * b;
  opaque(p);  // or it would be contracted with what is added next
  return p;
}

TORCHLIN_INLINE V<float> rooted(V<float> v) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<float>)_mm512_maskz_sqrt_ps(kAll, (__m512)v);
#elif TORCHLIN_ISA_BYTES == 32
  return (V<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (V<float>)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

template <int N>
TORCHLIN_INLINE V<float> sum_of(const triplet::Series<N>& series, V<float> z) {
  V<float> sum = splat(series.c[N - 1]);
  unroll<N - 1>([&](int i) __attribute__((always_inline)) { sum = times(sum, z) + series.c[N - 2 - i]; });
  return sum;
}

// log(k 2^-31), k whole, from 1 to 2^31.
TORCHLIN_INLINE V<float> log_fraction(V<float> k) {
  using I = V<int32_t>;
  constexpr int32_t kTwoThirds = 0x3f2aaaab;  // the bits of 2/3: [2/3, 4/3) has exponent 0
  const I e = ((I)k - kTwoThirds) >> 23;
  const V<float> f = (V<float>)((I)k - (e << 23)) - 1.0f, n = __builtin_convertvector(e - 31, V<float>);
  const V<float> tail = times(n, splat(triplet::kLn2Low)) + times(times(f, f), sum_of(triplet::log_series(), f));
  return times(n, splat(triplet::kLn2High)) + (f + tail);
}

TORCHLIN_INLINE void normal_pair(V<int32_t> a, V<int32_t> b, V<float>& x, V<float>& y) {
  using I = V<int32_t>;
  const I positive = ((I)((V<uint32_t>)a >> 1)) | 1;
  const V<float> radius = rooted(-2.0f * log_fraction(__builtin_convertvector(positive, V<float>)));
  // The angle in half turns, less the nearest quarter turn.
  const V<float> t = __builtin_convertvector(b | 1, V<float>) * 0x1p-31f;
  V<float> sum = t + t + 12582912.0f;
  opaque(sum);  // what is subtracted again must have been rounded
  const I quarter = (I)sum;
  const V<float> r = t - (sum - 12582912.0f) * 0.5f, z = times(r, r);
  const V<float> sine = times(r, sum_of(triplet::sine_series(), z)), cosine = sum_of(triplet::cosine_series(), z);
  const I odd = (quarter & 1) != 0;
  const I cosine_sign = (quarter + 1) << 30 & INT32_MIN, sine_sign = quarter << 30 & INT32_MIN;
  x = times(radius, (V<float>)((I)(odd ? sine : cosine) ^ cosine_sign));
  y = times(radius, (V<float>)((I)(odd ? cosine : sine) ^ sine_sign));
}

TORCHLIN_INLINE void normal_pair(V<int64_t> a, V<int64_t> b, V<double>& x, V<double>& y) {
  for (int i = 0; i < kLanes<double>; ++i) triplet::normal_pair(static_cast<uint32_t>(a[i]), static_cast<int32_t>(b[i]), x[i], y[i]);
}
