// The elementary functions of activations over V<float> and V<double>, in namespace tl under the names that generated functors
// use (torchlin/catalogue/cpp_code.py lists them with their semantics). Included inside a level's namespace after simd.h, once
// per level and file, hence no include guard; dual.h adds the same names for dual numbers.
//
// Each function is written once, as `name_pair`, which gives value and derivative from shared sub-results; what a caller does
// not use the compiler drops. Float: own polynomials, piecewise ones on AVX2 and AVX-512; errors within 2 units in the last
// place for exp, expm1, log, log1p, atan, 3 for tanh, sigmoid, erf, 4 for the rest; infinities, NaN and signed zeros included;
// results below the smallest normal number may be 0 (tests/test_simd_math.py). An argument is clamped where the result no
// longer depends on it, so that no intermediate is subnormal unless the result is: such operations cost a hundred times more.
// Double serves gradient checks, where speed is nothing: libm, lane by lane.
//
// Coefficients were fitted for this file: least squares at Chebyshev nodes, reweighted towards the minimax error, lower
// coefficients rounded to the type before higher ones are fitted. The stated error is relative to the function.

namespace tl {

using F = V<float>;
using I = V<int32_t>;
using D = V<double>;

template <class Vec>
struct Pair {
  Vec v, d;  // a value and a derivative
};

// ---- constants and parameters ----

// The type of constants beside T: T itself here; dual.h says what it is for a dual number.
template <class T>
struct constant_of {
  using type = T;
};
template <class T>
using constant = typename constant_of<T>::type;

template <class Vec>
using lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<Vec&>()[0])>>;

template <class T>
TORCHLIN_INLINE constant<T> lit(double c) {
  return splat(static_cast<lane<constant<T>>>(c));
}
// The kernel's P decides what a slot is: a scalar, a vector or, where derivatives by slots are wanted, a dual number.
template <class T, class P>
TORCHLIN_INLINE auto arg(const P& p, int i, int j = 0) {
  return p.template arg<T>(i, j);
}
template <class P>
TORCHLIN_INLINE int length(const P& p, int i) {
  return p.length(i);
}

// ---- bits, selection, comparison ----

constexpr float kInf = __builtin_inff(), kNaN = __builtin_nanf("");

TORCHLIN_INLINE F sign_bit(F u) { return (F)((I)u & INT32_MIN); }
TORCHLIN_INLINE F with_sign_of(F magnitude, F u) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_ternarylogic_epi32((__m512i)magnitude, (__m512i)u, _mm512_set1_epi32(INT32_MIN), 0xf8);  // a | (b & c)
#else
  return (F)((I)magnitude | (I)sign_bit(u));
#endif
}
TORCHLIN_INLINE F zero_unless(I mask, F u) {
#if TORCHLIN_ISA_BYTES == 64
  return mask ? u : F{};  // a masked move; as a vector the mask would cost two more
#else
  return (F)(mask & (I)u);
#endif
}

TORCHLIN_INLINE F where(I mask, F u, F v) { return mask ? u : v; }
TORCHLIN_INLINE D where(V<int64_t> mask, D u, D v) { return mask ? u : v; }

// a < b ? a : b, hence b if either is NaN: one instruction.
TORCHLIN_INLINE F least(F a, F b) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b);
#elif TORCHLIN_ISA_BYTES == 32
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
TORCHLIN_INLINE F most(F a, F b) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
#elif TORCHLIN_ISA_BYTES == 32
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
TORCHLIN_INLINE D least(D a, D b) { return a < b ? a : b; }
TORCHLIN_INLINE D most(D a, D b) { return a > b ? a : b; }

#if TORCHLIN_ISA_BYTES == 64
TORCHLIN_INLINE __mmask16 below(F a, float end) {  // NaN is below
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(end), _CMP_NGE_UQ);
}
#endif
// a b, and 0 for c >= end where a level has masks.
TORCHLIN_INLINE F product_below(F a, F b, [[maybe_unused]] F c, [[maybe_unused]] float end) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_mul_ps(below(c, end), (__m512)a, (__m512)b);
#else
  return a * b;
#endif
}

TORCHLIN_INLINE bool any(I mask) {
#if TORCHLIN_ISA_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif TORCHLIN_ISA_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes<float>; ++i) all |= mask[i];
  return all != 0;
#endif
}

// a*b + c in one rounding where the level has it; for where that matters. Elsewhere the compiler contracts.
TORCHLIN_INLINE F fma(F a, F b, F c) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_fmadd_ps(kAll, (__m512)a, (__m512)b, (__m512)c);
#elif TORCHLIN_ISA_BYTES == 32
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a/b and 1/b for 2^-120 < |b| < 2^120. A division occupies the divider for longer than a short function takes.
TORCHLIN_INLINE F reciprocal(F b) {
#if TORCHLIN_ISA_BYTES == 64
  const F y = (F)_mm512_maskz_rcp14_ps(kAll, (__m512)b);
  return fma(y, fma(-b, y, splat(1.0f)), y);
#else
  return 1.0f / b;
#endif
}
TORCHLIN_INLINE F quotient(F a, F b) {
#if TORCHLIN_ISA_BYTES == 64
  const F y = (F)_mm512_maskz_rcp14_ps(kAll, (__m512)b), q = a * y;
  return fma(y, fma(-b, q, a), q);
#else
  return a / b;
#endif
}

// c[0] + x (c[1] + x (c[2] + ...))
template <class Vec, class C>
TORCHLIN_INLINE Vec poly(Vec, C c) {
  return splat(static_cast<lane<Vec>>(c));
}
template <class Vec, class C, class... Rest>
TORCHLIN_INLINE Vec poly(Vec x, C c, Rest... rest) {
  return poly(x, rest...) * x + static_cast<lane<Vec>>(c);
}

TORCHLIN_INLINE F abs(F u) { return (F)((I)u & INT32_MAX); }
TORCHLIN_INLINE D abs(D u) { return (D)((V<int64_t>)u & INT64_MAX); }
template <class Vec>
TORCHLIN_INLINE Vec sign_of(Vec u) {
  const Vec one = lit<Vec>(1.0), none{};
  return (u > none ? one : none) - (u < none ? one : none);
}
TORCHLIN_INLINE F minus_abs(F u) { return (F)((I)u | INT32_MIN); }
TORCHLIN_INLINE F sign(F u) { return sign_of(u); }
TORCHLIN_INLINE D sign(D u) { return sign_of(u); }

#undef TORCHLIN_NO_FMA
#if defined(__x86_64__) && TORCHLIN_ISA_BYTES == 16
#define TORCHLIN_NO_FMA 1
// Where float needs a product's rounding error.
using Wide = typename vector_of<double, kLanes<float>>::type;
#else
#define TORCHLIN_NO_FMA 0
#endif

// ---- piecewise polynomials ----

// One shuffle looks up a coefficient for each lane: AVX2 has 8 pieces of a function in a register, AVX-512 has 16. Other levels
// have one polynomial for all.
#if TORCHLIN_ISA_BYTES >= 32
#include "simd/tables.h"

constexpr int kPieces = kLanes<float>;
TORCHLIN_INLINE F lookup(const float (&table)[kPieces], I index) {  // by the low bits
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_permutexvar_ps(kAll, (__m512i)index, _mm512_load_ps(table));
#else
  return (F)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
#endif
}
TORCHLIN_INLINE F lookup16(const float (&table)[16], I index) {
#if TORCHLIN_ISA_BYTES == 64
  return lookup(table, index);
#else
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  return (F)_mm256_blendv_ps(low, _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)index), (__m256)(index << 28));
#endif
}
#if TORCHLIN_ISA_BYTES == 64
TORCHLIN_INLINE F lookup(const float (&table)[32], I index) {
  const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
  return (F)_mm512_maskz_permutex2var_ps(kAll, low, (__m512i)index, high);
}
#endif
template <int N, int Pieces>
TORCHLIN_INLINE F piecewise(const float (&c)[N][Pieces], I index, F r) {
  F p{};
  unroll<N>([&](int k) { p = p * r + lookup(c[N - 1 - k], index); });
  return p;
}
// Pieces of equal width; the first is centred at 0.
template <int N>
TORCHLIN_INLINE F piecewise(const float (&c)[N][kPieces], float width, F u) {
  const F sum = fma(u, splat(1.0f / width), splat(12582912.0f)), n = sum - 12582912.0f;
  return piecewise(c, (I)sum, fma(n, splat(-width), u));
}
#endif

// ---- exponentials ----

// exp(x + low) = p 2^n or p s s: there is one instruction for the first, and where not the two factors neither overflow nor
// round before the result must.
struct Exponential {
  F p, s;  // s is n itself where there is the instruction
};
#if TORCHLIN_ISA_BYTES == 64
constexpr float kExpMagic = 12582912.0f / 16;  // a sum with it has 16 n in its low bits
#elif TORCHLIN_ISA_BYTES == 32
constexpr float kExpMagic = 12582912.0f / 8 + 127.0f;  // 8 (n/2 + 127)
#else
constexpr float kExpMagic = 12582912.0f + 254.0f;  // n + 254
#endif
// exp(r) 2^n, with n, or half of it, in the low bits of the sum: all of them or, behind those of a whole number, what looks up
// the power of a root of 2.
TORCHLIN_INLINE Exponential times_power(F r, F sum) {
#if TORCHLIN_ISA_BYTES == 64
  // exp(r) = 1 + r + r^2 Q(r), |r| <= 0.0218: 2e-9
  const F q = r * 1.666704565e-01f + 5.000163913e-01f, root = lookup(kExp, (I)sum);
  return {(q * (r * r) + r) * root + root, sum - kExpMagic};  // the instruction takes n rounded down
#elif TORCHLIN_ISA_BYTES == 32
  // |r| <= 0.0869: 5e-9
  const F q = poly(r, 4.999999702e-01f, 1.667213589e-01f, 4.168061912e-02f), root = lookup(kExp, (I)sum);
  return {(q * (r * r) + r) * root + root, (F)((I)sum << 20 & INT32_MIN >> 8)};
#else
  // exp(r) = 1 + r Q(r), |r| <= 0.3475: 3e-9
  const F q = poly(r, 1.0f, 4.999999400e-01f, 1.666652110e-01f, 4.166828840e-02f, 8.368714710e-03f, 1.381901910e-03f);
  return {(r * q + 1.0f) * (F)((127 << 23) + (((I)sum & 1) << 23)), (F)((I)sum << 22 & INT32_MIN >> 8)};
#endif
}
constexpr float kExpUnit = TORCHLIN_ISA_BYTES == 32 ? 2.0f : 1.0f;  // of n
template <class... Low>
TORCHLIN_INLINE Exponential exponential(F x, Low... low) {
#if TORCHLIN_NO_FMA
  constexpr float kHigh = 0.693115234375f, kLow = 3.1946185e-05f;  // n times the first is exact
#else
  constexpr float kHigh = 0.6931471825f, kLow = -1.904654323e-09f;
#endif
  const F sum = x * (1.4426950408889634f / kExpUnit) + kExpMagic, n = sum - kExpMagic;
  const F r = x - n * (kHigh * kExpUnit);
  return times_power(((r - n * (kLow * kExpUnit)) + ... + low), sum);
}
TORCHLIN_INLINE F quarter(Exponential e) {  // cosh overflows later than exp
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_scalef_ps(kAll, (__m512)e.p, (__m512)(e.s - 2.0f));
#else
  return e.p * e.s * (e.s * 0.25f);
#endif
}

// exp(x + low) for x <= 89, and 0 for x < zero: by default where it is below the smallest normal number, because an underflow
// takes as long as a hundred instructions.
constexpr float kNormal = -87.3365f, kSubnormal = -104.0f;
template <class... Low>
TORCHLIN_INLINE F exp_core(F x, [[maybe_unused]] float zero, Low... low) {
#if TORCHLIN_ISA_BYTES == 64
  const Exponential e = exponential(x, low...);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(zero), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(kept, (__m512)e.p, (__m512)e.s);
#else
  const Exponential e = exponential(most(splat(-175.5f), x), low...);  // there s is 0 itself
  return e.p * e.s * e.s;
#endif
}
TORCHLIN_INLINE F exp_core(F x) { return exp_core(x, kNormal); }
TORCHLIN_INLINE Pair<F> exp_pair(F u) {
  const F v = exp_core(least(splat(89.0f), u));
  return {v, v};
}

// expm1 and exp of -86 <= x <= 89, both halved so that they do not overflow before sinh and the like.
struct HalfExpm1 {
  F minus_half, half;
};
// s q + s - 1/2, s = 2^(n-1), cancels where r < 0 and n = 1. That costs one unit; where x >= 0 a quarter less is rounded to n,
// and r is small there.
template <bool kNonnegative = false>
TORCHLIN_INLINE HalfExpm1 half_expm1(F x) {
  constexpr float kMagic = 12582912.0f + 126.0f;
  const F sum = (kNonnegative ? x * 1.4426950408889634f - 0.25f : x * 1.4426950408889634f) + kMagic, n = sum - kMagic;
  F r = x - n * 0.693115234375f;
  r = r - n * 3.1946185e-05f;
  // expm1(r) = r + r^2 G(r), |r| <= 0.348: 4e-9; -0.18 <= r <= 0.53: 5e-10
  const F g = kNonnegative ? poly(r, 5.000000000e-01f, 1.666666567e-01f, 4.166700318e-02f, 8.333104663e-03f,
                                  1.379437046e-03f, 2.288595133e-04f)
                           : poly(r, 5.000000000e-01f, 1.666654497e-01f, 4.166677594e-02f, 8.366472088e-03f,
                                  1.390568679e-03f);
  const F q = r * (r * g) + r, s = (F)((I)sum << 23);
  return {s * q + (s - 0.5f), s * q + s};
}

TORCHLIN_INLINE Pair<F> expm1_pair(F u) {
  const HalfExpm1 h = half_expm1(most(splat(-86.0f), least(splat(89.0f), u)));
  const F e = h.minus_half + h.minus_half, d = h.half + h.half;
  return {with_sign_of(e, u), zero_unless(~(u < -86.0f), d)};
}

// With e = exp(-2|u|): tanh |u| = (1 - e)/(1 + e), and its derivative is 4 e/(1 + e)^2.
TORCHLIN_INLINE Pair<F> tanh_pair(F u) {
#if TORCHLIN_ISA_BYTES == 64
  const F a = least(splat(9.14f), abs(u));
  const I index = (I)(a * 1.62f + 1.0f) >> 21;
  const F e = exp_core(-2.0f * abs(u)), y = reciprocal(1.0f + e);
  return {with_sign_of(piecewise(kTanh, index, a - lookup(kTanhCentre, index)), u), (e * (y + y)) * (y + y)};
#else
  const F a = least(splat(43.0f), abs(u));
  constexpr float kMagic = 12582912.0f + 127.0f;
  const F sum = a * -2.8853900817779268f + kMagic, n = sum - kMagic;
  F r = n * 0.3465576171875f + a;  // half of ln 2 in two parts
  r = n * 1.59730925e-05f + r;
  // 1 - exp(-2 r), |r| <= 0.174: 1e-8
  const F q = r * poly(r, 2.0f, -1.99999988f, 1.33332360f, -6.66678965e-01f, 2.67726481e-01f, -8.87738764e-02f);
  const F s = (F)((I)sum << 23), minus = s * q + (1.0f - s), d = 2.0f - minus, y = 1.0f / d;
  const F slope = (s - s * q) * ((y + y) * (y + y));
  return {with_sign_of(minus / d, u), abs(u) >= 43.0f ? F{} : slope};
#endif
}

// e = exp(-|u|): 1/(1 + e), and e/(1 + e).
struct Sigmoid {
  F v, complement;
};
TORCHLIN_INLINE Sigmoid sigmoid_parts(F u) {
  const F e = exp_core(minus_abs(u), kSubnormal), one = splat(1.0f), d = one + e;
  const I positive = u > 0.0f;
  return {quotient(positive ? one : e, d), quotient(positive ? e : one, d)};
}
TORCHLIN_INLINE Pair<F> sigmoid_pair(F u) {
  const Sigmoid s = sigmoid_parts(u);
  return {s.v, s.v * s.complement};
}

// With n = e (e + 2), e = exp(u): tanh(log(1 + e)) = n/(n + 2), and its derivative is 4 e (e + 1)/(n + 2)^2.
TORCHLIN_INLINE Pair<F> tanh_softplus_pair(F u) {
  const F e = exp_core(least(splat(43.0f), u), kSubnormal), n = e * (e + 2.0f), y = reciprocal(n + 2.0f), c = y + y;
  return {quotient(n, n + 2.0f), u >= 43.0f ? F{} : (e * c) * ((e + 1.0f) * c)};
}

TORCHLIN_INLINE Pair<F> sech_pair(F u) {
  const F e = exp_core(minus_abs(u), kSubnormal), v = quotient(e + e, 1.0f + e * e);
  return {v, -v * tanh_pair(u).v};
}

// sinh and cosh overflow later than exp: everything at a half or a quarter.
TORCHLIN_INLINE Pair<F> cosh_sinh(F u) {
  const F a = abs(u);
  const F fourth = quarter(exponential(least(splat(92.0f), a)));
  const F small = half_expm1<true>(least(splat(10.0f), a)).minus_half, whole = small + small;
  const F sinh = a < 9.0f ? small + quotient(small, whole + 1.0f) : fourth + fourth;
  return {(fourth + fourth) + 0.125f / fourth, with_sign_of(sinh, u)};
}
TORCHLIN_INLINE Pair<F> cosh_pair(F u) { return cosh_sinh(u); }
TORCHLIN_INLINE Pair<F> sinh_pair(F u) {
  const Pair<F> both = cosh_sinh(u);
  return {both.d, both.v};
}

// ---- logarithms ----

#if TORCHLIN_ISA_BYTES == 64
// x = m 2^k with m in [3/4, 3/2), and m = 1 for 0 and infinity; NaN below 0.
struct Parts {
  F m, k;
};
TORCHLIN_INLINE Parts parts(F x) {
  const __m512 m = _mm512_maskz_getmant_ps(kAll, (__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  return {(F)m, (F)_mm512_maskz_getexp_ps(kAll, (__m512)x) - (F)_mm512_maskz_getexp_ps(kAll, m)};
}
// k ln 2 + log(1 + f), 1 + f close to m: by the reciprocal of the centre of its piece, which is 1 around 1.
TORCHLIN_INLINE F log_of_parts(Parts p, F f) {
  const I index = (I)p.m >> 19;
  const F near = lookup(kReciprocal, index), r = f * near + (near - 1.0f);
  // log(1 + r) = r + r^2 R(r), -0.032 <= r <= 0.063: 3e-9
  const F q = poly(r, -5.000000000e-01f, 3.333446383e-01f, -2.500827014e-01f, 1.887146086e-01f);
  const F low = (r * r) * q + p.k * 5.769998879e-08f;
  return (p.k * 0.693147123f + lookup(kLogReciprocal, index)) + (r + low);  // ln 2 in two positive parts, for infinite k
}
// log(1 + x)
TORCHLIN_INLINE F log1p_core(F x) {
  const F y = x + 1.0f;
  const Parts p = parts(y);
  const F s = (F)_mm512_maskz_scalef_ps(kAll, _mm512_set1_ps(1.0f), (__m512)-p.k);
  return log_of_parts(p, (y > 0.0f) & (y < 0x1p100f) ? x * s + (s - 1.0f) : p.m - 1.0f);
}
TORCHLIN_INLINE F log_core(F x) {
  const Parts p = parts(x);
  return log_of_parts(p, p.m - 1.0f);
}
#else
// k ln 2 + log(1 + f) for f in [-1/3, 1/3].
TORCHLIN_INLINE F log_of_parts(F k, F f) {
  // log(1 + f) = f + f^2 R(f): 1e-8
  const F r = poly(f, -5.000000000e-01f, 3.333321214e-01f, -2.499983162e-01f, 2.001057714e-01f, -1.667896211e-01f,
                   1.400353312e-01f, -1.220517159e-01f, 1.399444193e-01f, -1.280185133e-01f);
  return k * 0.693115234375f + (f * (f * r) + (k * 3.1946185e-05f + f));
}
constexpr int32_t kTwoThirds = 0x3f2aaaab;  // the bits of 2/3: [2/3, 4/3) has exponent 0

TORCHLIN_INLINE F log1p_finite(F x) {  // -1 < x < 2^126
  const I k = ((I)(x + 1.0f) - kTwoThirds) >> 23;
  const F s = (F)(0x3f800000 - (k << 23));  // 2^-k
  return log_of_parts(__builtin_convertvector(k, F), x * s + (s - 1.0f));
}
// log(1 + x)
TORCHLIN_INLINE F log1p_core(F x) {
  const I big = x > 0x1p125f;
  const F v = log1p_finite(big ? x * 0.125f : x) + zero_unless(big, splat(2.0794415416798357f));
  return x == kInf ? x : x <= -1.0f ? (x < -1.0f ? splat(kNaN) : splat(-kInf)) : v;
}
TORCHLIN_INLINE F log_core(F x) {
  const I tiny = x < 0x1p-126f;
  const F scaled = tiny ? x * 0x1p23f : x;
  const I e = ((I)scaled - kTwoThirds) >> 23;
  const F m = (F)((I)scaled - (e << 23)), k = __builtin_convertvector(e, F) - zero_unless(tiny, splat(23.0f));
  const F v = log_of_parts(k, m - 1.0f);
  return (x > 0.0f) & (x < kInf) ? v : x == 0.0f ? splat(-kInf) : x < 0.0f ? splat(kNaN) : x;
}
#endif

TORCHLIN_INLINE F log1p_unit(F x) {  // 0 <= x <= 1
#if TORCHLIN_ISA_BYTES >= 32
  return piecewise(kLog1p, kLog1pWidth, x);
#else
  return log1p_finite(x);
#endif
}

TORCHLIN_INLINE Pair<F> log1p_pair(F u) { return {with_sign_of(log1p_core(u), u), 1.0f / (1.0f + u)}; }
TORCHLIN_INLINE Pair<F> log_pair(F u) { return {log_core(u), 1.0f / u}; }

// max(u, 0) + log1p(exp(-|u|))
TORCHLIN_INLINE Pair<F> softplus_pair(F u) {
  const F e = exp_core(minus_abs(u)), y = reciprocal(1.0f + e);
  return {most(F{}, u) + log1p_unit(e), u > 0.0f ? y : e * y};
}

TORCHLIN_INLINE Pair<F> log1p_sigmoid_pair(F u) {
  const Sigmoid s = sigmoid_parts(u);
  return {log1p_unit(s.v), quotient(s.v * s.complement, 1.0f + s.v)};
}

// ---- roots ----

TORCHLIN_INLINE F root(F u) {
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_sqrt_ps(kAll, (__m512)u);
#elif TORCHLIN_ISA_BYTES == 32
  return (F)_mm256_sqrt_ps((__m256)u);
#elif defined(__x86_64__)
  return (F)_mm_sqrt_ps((__m128)u);
#else
  F v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(u[i]);
  return v;
#endif
}
TORCHLIN_INLINE Pair<F> sqrt_pair(F u) {
  const F v = root(u);
  return {v, 0.5f / v};
}

// Squares are taken beside 1: both numbers are divided by the power of two of the larger.
TORCHLIN_INLINE F hypot(F k, F u) {
  const F a = abs(k), b = abs(u), larger = where(b <= a, a, b);
  I e = (I)larger & 0x7f800000;
  e = e > (252 << 23) ? I{} + (252 << 23) : e;
  e = e < (1 << 23) ? I{} + (1 << 23) : e;
  const F down = (F)((254 << 23) - e), up = (F)e, x = a * down, y = b * down, z = x * x + y * y;
#if TORCHLIN_ISA_BYTES == 64
  // The instruction for roots takes longer than the rest; 0 and infinity come back by the scale.
  const F safe = least(splat(0x1p100f), most(splat(0x1p-100f), z));
  const F inverse = (F)_mm512_maskz_rsqrt14_ps(kAll, (__m512)safe), near = safe * inverse;
  return fma(fma(-near, near, safe), 0.5f * inverse, near) * up;
#else
  return root(z) * up;
#endif
}

TORCHLIN_INLINE Pair<F> asinh_pair(F u) {
  const F a = abs(u);
  const I big = a > 0x1p30f;
  const F small = a + a * (a / (1.0f + root(a * a + 1.0f)));
  const F v = log1p_core(big ? a : small) + zero_unless(big, splat(0.6931471805599453f));
  return {with_sign_of(v, u), 1.0f / hypot(splat(1.0f), u)};
}

// ---- erf, erfc and the normal distribution ----

// exp(-c b^2) for b >= 0, and 0 for b >= end, without the rounding error of b^2, which would be 100 units of the result; c is 1
// or 1/2, and b no more than 19 or 13 where a level has no masks.
TORCHLIN_INLINE F exp_minus_square(F b, float c, [[maybe_unused]] float end) {
#if TORCHLIN_NO_FMA
  const F upper = (F)((I)b & ~0xfff);
  return exp_core(upper * upper * -c, kSubnormal, (b - upper) * (b + upper) * -c);
#else
  const F scale = b * -c, x = TORCHLIN_ISA_BYTES == 64 ? scale * b : most(splat(-175.5f), scale * b);
  const F sum = x * (1.4426950408889634f / kExpUnit) + kExpMagic, n = sum - kExpMagic;
  // n times the first part of ln 2 is exact, and the difference is rounded once.
  const F r = fma(scale, b, n * (-0.693115234375f * kExpUnit)) - n * (3.1946185e-05f * kExpUnit);
  const Exponential e = times_power(r, sum);
#if TORCHLIN_ISA_BYTES == 64
  return (F)_mm512_maskz_scalef_ps(below(b, end), (__m512)e.p, (__m512)e.s);
#else
  return e.p * e.s * e.s;
#endif
#endif
}

constexpr float kRoot2 = 1.4142135623730951f, kTwoOverRootPi = 1.1283791670955126f, kOneOverRoot2Pi = 0.3989422804014327f;

// exp(b^2/2) Phi(-b) for b = a or, where kErfc, a sqrt(2); b in [0, 14.4], anything beyond.
template <bool kErfc = false>
TORCHLIN_INLINE F normal_tail(F a) {
#if TORCHLIN_ISA_BYTES >= 32
  // Pieces of equal relative width, found by the leading bits of a + 1.
  const F b = kErfc ? kRoot2 * a : a;
#if TORCHLIN_ISA_BYTES == 64
  const I index = (I)(b + 1.0f) >> 20;
#else
  const I index = (I)(least(splat(14.9f), b) + 1.0f) >> 22;
#endif
  return piecewise(kTail, index, b - lookup(kTailCentre, index));
#else
  // 1/2 t Q(1 - 6 t), t = 1/(b sqrt(1/2) + 3): 8e-9. An error of t is tripled: t and y are to be right to their last places.
#if TORCHLIN_NO_FMA
  const Wide wide = 1.0 / (__builtin_convertvector(a, Wide) * (kErfc ? 1.0 : M_SQRT1_2) + 3.0);
  const F t = __builtin_convertvector(wide, F), y = __builtin_convertvector(1.0 - 6.0 * wide, F);
#else
  const F c = kErfc ? a : a * 0.7071067811865476f, sum = c + 3.0f, lost = c - (sum - 3.0f), near = 1.0f / sum;
  const F correction = near * (fma(-near, sum, splat(1.0f)) - lost * near);
  const F t = near + correction, y = fma(splat(-6.0f), near, splat(1.0f)) - 6.0f * correction;
#endif
  const F q = poly(y, 1.074006915e+00f, -8.833944798e-01f, 5.902280211e-01f, -3.104660213e-01f, 1.195313483e-01f,
                   -2.683952451e-02f, -1.233430346e-03f, 3.077646252e-03f, -4.756601702e-04f, -3.204217064e-04f);
  return 0.5f * t * q;
#endif
}

TORCHLIN_INLINE F within(F bound, F a) { return TORCHLIN_ISA_BYTES == 64 ? a : least(bound, a); }

// erf a = a + a P(a^2), |a| <= 1: 2e-9
TORCHLIN_INLINE F erf_small(F a) {
  const F p = poly(a * a, 1.283791661e-01f, -3.761262596e-01f, 1.128358245e-01f, -2.685364336e-02f, 5.187962670e-03f,
                   -8.006793214e-04f, 7.842288323e-05f);
  return a * p + a;
}
TORCHLIN_INLINE Pair<F> ndtr_pair(F u) {
  constexpr float kEnd = 12.951f;
  const F a = within(splat(19.0f), abs(u)), e = exp_minus_square(a, 0.5f, kEnd);
  const F tail = product_below(e, normal_tail(a), a, kEnd);
  const F v = u > 0.0f ? 1.0f - tail : tail;
  return {TORCHLIN_ISA_BYTES == 16 ? where(a < 0.8f, erf_small(u * 0.7071067811865476f) * 0.5f + 0.5f, v) : v,
          kOneOverRoot2Pi * e};
}
TORCHLIN_INLINE Pair<F> erfc_pair(F u) {
  constexpr float kEnd = 9.1952f;
  const F a = within(splat(13.4f), abs(u)), e = exp_minus_square(a, 1.0f, kEnd);
  const F half = product_below(e, normal_tail<true>(a), a, kEnd), far = u < 0.0f ? 2.0f - (half + half) : half + half;
  return {TORCHLIN_ISA_BYTES == 16 ? where(a < 0.81f, 1.0f - erf_small(u), far) : far, -kTwoOverRootPi * e};
}
TORCHLIN_INLINE Pair<F> erf_pair(F u) {
  const F a = within(splat(13.4f), abs(u)), e = exp_minus_square(a, 1.0f, 9.3454f);
#if TORCHLIN_ISA_BYTES >= 32
  const F v = piecewise(kErf, kErfWidth, least(splat(kErfOne), abs(u)));
#else
  const F half = e * normal_tail<true>(a), v = a < 1.0f ? erf_small(a) : 1.0f - (half + half);
#endif
  return {with_sign_of(v, u), kTwoOverRootPi * e};
}

// ---- trigonometry ----

// Where reduction in float no longer holds: beyond, and for infinities, libm.
constexpr float kTrigLimit = 8192.0f;
template <bool kCosine>
__attribute__((noinline)) inline F sine_far(F u) {
  F v;
  for (int i = 0; i < kLanes<float>; ++i) {
    const double x = u[i];
    v[i] = static_cast<float>(kCosine ? std::cos(x) : std::sin(x));
  }
  return v;
}

// sin u or cos u = (-1)^k sin r with r = u - n pi, |r| <= pi/2, where n is k or k - 1/2.
template <bool kCosine>
TORCHLIN_INLINE F sine(F u) {
  if (any(abs(u) > kTrigLimit)) return sine_far<kCosine>(u);
  constexpr float kMagic = 12582912.0f, kShift = kCosine ? 0.5f : 0.0f;
  const F sum = (u * 0.3183098861837907f + kShift) + kMagic, n = (sum - kMagic) - kShift;
#if TORCHLIN_NO_FMA
  // No FMA, so n times a part of pi would not be exact: in double.
  const Wide wide = __builtin_convertvector(n, Wide);
  const F r = __builtin_convertvector(
      __builtin_convertvector(u, Wide) - wide * 3.1415926534682512 - wide * 1.2154201013012384e-10, F);
#else
  // pi in three floats. The first difference is exact, since u and n times the first part are close.
  F r = fma(n, splat(-0x1.921fb6p+1f), u);
  r = fma(n, splat(0x1.777a5cp-24f), r);
  r = fma(n, splat(0x1.ee59dap-49f), r);
#endif
  // sin r = r + r z S(z): 6e-9
  const F z = r * r;
  const F v = r * (z * poly(z, -1.666665971e-01f, 8.333069272e-03f, -1.980976813e-04f, 2.606053386e-06f)) + r;
  return (F)((I)v ^ ((I)sum << 31));
}
TORCHLIN_INLINE Pair<F> sin_pair(F u) { return {u == 0.0f ? u : sine<false>(u), sine<true>(u)}; }
TORCHLIN_INLINE Pair<F> cos_pair(F u) { return {sine<true>(u), -sine<false>(u)}; }
TORCHLIN_INLINE Pair<F> sinc_pair(F u) {
  const I zero = u == 0.0f;
  const F x = zero ? splat(1.0f) : u, v = zero ? splat(1.0f) : sine<false>(u) / x;
  // (cos u - sinc u)/u cancels near 0: its series, with an error of 3e-8 at 1
  const F z = u * u, near = u * poly(z, -1.0f / 3, 1.0f / 30, -1.0f / 840, 1.0f / 45360, -1.0f / 3991680);
  return {v, abs(u) < 1.0f ? near : (sine<true>(u) - v) / x};
}

TORCHLIN_INLINE Pair<F> atan_pair(F u) {
  const F a = abs(u);
  const I outer = a > 1.0f;
  const F t = (outer ? splat(-1.0f) : a) / (outer ? a : splat(1.0f)), z = t * t;
  // atan t = t + t z A(z), |t| <= 1: 3e-9
  const F p = t * (z * poly(z, -3.333329856e-01f, 1.999853104e-01f, -1.426405013e-01f, 1.095115393e-01f, -8.400370926e-02f,
                            5.790401995e-02f, -3.112378903e-02f, 1.088529080e-02f, -1.787013840e-03f)) + t;
  const F v = outer ? (p - 4.371139e-08f) + 1.5707964f : p;
  const F square = u * u;
  return {with_sign_of(v, u), 1.0f / (1.0f + square)};
}

// ---- powers ----

#if TORCHLIN_ISA_BYTES >= 32
// v log2(u) reaches 150, and its rounding in float alone would be 60 units of the result: in sums of two floats.
TORCHLIN_INLINE F power_of_positive(F u, F v) {
#if TORCHLIN_ISA_BYTES == 64
  const Parts part = parts(u);
  const F m = part.m, k = part.k;
#else
  const I tiny = u < 0x1p-126f;
  const F normal = tiny ? u * 0x1p23f : u;
  const I e = ((I)normal - 0x3f400000) >> 23;  // m from 3/4
  const F m = (F)((I)normal - (e << 23));
  const F k = u < kInf ? u > 0.0f ? __builtin_convertvector(e, F) - zero_unless(tiny, splat(23.0f)) : splat(-kInf) : u;
#endif
  // m = (1 + r)/near; r in two floats
  const I index = (I)m >> 19;
  const F near = lookup16(kReciprocal, index), product = m * near, rest = fma(m, near, -product), r = product - 1.0f;
  // log2(1 + r) = r/ln 2 + r^2 R(r), -0.032 <= r <= 0.063: 6e-11
  const F high = r * 1.44269502f;
  const F q = poly(r, -7.213475110e-01f, 4.808983500e-01f, -3.606987890e-01f, 2.886660400e-01f, -2.245863680e-01f);
  F low = fma(rest - rest * r, splat(1.44269502f), fma(r, splat(1.44269502f), -high)) + r * 1.92596303e-08f;
  low = (r * r) * q + (low + lookup16(kLog2Low, index));
  const F whole = k + lookup16(kLog2High, index), near_log = whole + high;  // the first sum is exact
  low = zero_unless(abs(near_log) < kInf, low + ((whole - near_log) + high));
  const F log = near_log + low, y = v * log;
  low = (near_log - log) + low;
  const I inside = abs(y) < 200.0f;
  const F more = zero_unless(inside, fma(v, log, -y) + v * low), x = most(splat(-200.0f), least(splat(200.0f), y));
#if TORCHLIN_ISA_BYTES == 64
  const F sum = x + kExpMagic;
  const Exponential power = times_power(((x - (sum - kExpMagic)) + more) * 0.6931471825f, sum);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(kept, (__m512)power.p, (__m512)power.s);
#else
  const F sum = x * 0.5f + kExpMagic;
  const Exponential power = times_power(((x - 2.0f * (sum - kExpMagic)) + more) * 0.6931471825f, sum);
  return power.p * power.s * power.s;
#endif
}
#else
// log2 and exp2 in double: v log2(u) reaches 150, and its rounding in float alone would be 60 units of the result.
using Half = typename vector_of<float, kLanes<double>>::type;
using L = V<int64_t>;

TORCHLIN_INLINE D log2_positive(D x) {  // x > 0, normal
  constexpr int64_t kBits = 0x3fe5555555555555;  // 2/3
  // The exponent plus 1024, so that the shift is unsigned, and to double by way of the bits of 2^52: few levels have more.
  const V<uint64_t> e = ((V<uint64_t>)x - static_cast<uint64_t>(kBits) + (1024ull << 52)) >> 52;
  const D k = (D)(e | 0x4330000000000000ull) - (0x1p52 + 1024.0);
  const D m = (D)((V<uint64_t>)x - ((e - 1024) << 52)), s = (m - 1.0) / (m + 1.0), z = s * s;
  // log2((1 + s)/(1 - s)) = s (2/ln 2 + z L(z)), |s| <= 0.2: 5e-15
  return k + s * poly(z, 2.8853900817779268, 9.61796693918332002e-01, 5.77078020030251770e-01, 4.12197994488480990e-01,
                      3.20642180138161037e-01, 2.60706380148146177e-01, 2.50758514057159321e-01);
}
TORCHLIN_INLINE D exp2_wide(D y) {  // NaN stays NaN; beyond float's range what becomes 0 or infinity in float
  constexpr double kMagic = 6755399441055744.0 + 1023.0;
  const D x = y > 200.0 ? splat(200.0) : y < -200.0 ? splat(-200.0) : y;
  const D sum = x + kMagic, r = x - (sum - kMagic);
  // 2^r, |r| <= 1/2: 8e-13
  const D p = poly(r, 1.0, 6.93147180545938602e-01, 2.40226506954838631e-01, 5.55041094120339723e-02,
                   9.61812922403087155e-03, 1.33334505650132651e-03, 1.54034149055115929e-04, 1.53100807368265574e-05,
                   1.32633617700696892e-06);
  return p * (D)((L)sum << 52);
}
TORCHLIN_INLINE F narrow(D low, D high) {
  const Half parts[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
  F v;
  std::memcpy(&v, parts, sizeof v);
  return v;
}
TORCHLIN_INLINE D widen(F u, int part) {
  Half h[2];
  std::memcpy(h, &u, sizeof u);
  return __builtin_convertvector(h[part], D);
}

TORCHLIN_INLINE F power_of_positive(F a, F v) {
  D y[2];
  for (int part = 0; part < 2; ++part) {
    const D x = widen(a, part);
    const D log = (x > 0.0) & (x < 1e300) ? log2_positive(x) : x == 0.0 ? splat(-1e300 * 1e300) : x;  // inf and NaN: themselves
    y[part] = exp2_wide(widen(v, part) * log);
  }
  return narrow(y[0], y[1]);
}
#endif

TORCHLIN_INLINE F pow(F u, F v) {
  const F a = abs(u);
  F r = power_of_positive(a, v);
  r = (u == 1.0f) | (v == 0.0f) ? splat(1.0f) : r;
  const I negative = (I)u < 0;
  if (!any(negative)) return r;
  r = (u == -1.0f) & (v == v) ? splat(1.0f) : r;
  const I whole = __builtin_convertvector(least(splat(0x1p24f), abs(v)), I);  // even beyond 2^24
  const I integral = (__builtin_convertvector(whole, F) == abs(v)) | (abs(v) >= 0x1p24f);
  const I odd = -(whole & 1) & integral;
  r = (u < 0.0f) & (a < kInf) & ~integral & (v == v) ? splat(kNaN) : r;
  return (F)((I)r ^ ((I)sign_bit(u) & odd));
}
// Derivatives of pow by u and by v. The first is v power/u or, of 0 and infinity, v times 0, 1 or infinity.
TORCHLIN_INLINE F pow_by_base(F u, F v, F power) {
  const I zero = u == 0.0f, whole = zero | (abs(u) == kInf);
  const F limit = v == 1.0f ? splat(1.0f) : (v > 1.0f) ^ zero ? splat(kInf) : F{};
  const F slope = whole ? (F)((I)limit | (((I)power ^ (I)u) & INT32_MIN)) : power / u;
  return v == 0.0f ? F{} : v * slope;
}
TORCHLIN_INLINE F pow_by_exponent(F u, F v, F power) {
  return (u == 0.0f) & (v >= 0.0f) ? F{} : power * log_core(u);
}

// ---- double: libm ----

template <class Function>
TORCHLIN_INLINE D by_lane(Function f, D u) {
  D v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = f(u[i]);
  return v;
}
#define TORCHLIN_LIBM(name, value, derivative)                                     \
  TORCHLIN_INLINE Pair<D> name##_pair(D u) {                                       \
    const D v = by_lane([](double x) { return value; }, u);                        \
    D d;                                                                           \
    for (int i = 0; i < kLanes<double>; ++i) {                                     \
      const double x = u[i], f = v[i];                                             \
      (void)x, (void)f;                                                            \
      d[i] = derivative;                                                           \
    }                                                                              \
    return {v, d};                                                                 \
  }

namespace libm {
inline double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x >= 0 ? 1.0 : e) / (1.0 + e);
}
inline double sech(double x) {
  const double e = std::exp(-std::fabs(x));
  return 2.0 * e / (1.0 + e * e);
}
inline double tanh_softplus(double x) {
  const double e = std::exp(x > 40.0 ? 40.0 : x), n = e * (e + 2.0);
  return n / (n + 2.0);
}
inline double tanh_softplus_slope(double x) {
  if (x > 170.0) return 0.0;
  const double e = std::exp(x), c = 2.0 / (e * (e + 2.0) + 2.0);
  return (e * c) * ((e + 1.0) * c);
}
inline double sinc_slope(double x, double f) {
  if (std::fabs(x) > 0.1) return (std::cos(x) - f) / x;
  const double z = x * x;
  return x * (-1.0 / 3 + z * (1.0 / 30 + z * (-1.0 / 840 + z * (1.0 / 45360 - z / 3991680))));
}
}  // namespace libm

TORCHLIN_LIBM(exp, std::exp(x), f)
TORCHLIN_LIBM(expm1, std::expm1(x), std::exp(x))
TORCHLIN_LIBM(log, std::log(x), 1.0 / x)
TORCHLIN_LIBM(log1p, std::log1p(x), 1.0 / (1.0 + x))
TORCHLIN_LIBM(tanh, std::tanh(x), libm::sech(x) * libm::sech(x))
TORCHLIN_LIBM(sigmoid, libm::sigmoid(x), f * libm::sigmoid(-x))
TORCHLIN_LIBM(softplus, (x > 0 ? x : 0.0) + std::log1p(std::exp(-std::fabs(x))), libm::sigmoid(x))
TORCHLIN_LIBM(erf, std::erf(x), M_2_SQRTPI * std::exp(-x * x))
TORCHLIN_LIBM(erfc, std::erfc(x), -M_2_SQRTPI * std::exp(-x * x))
TORCHLIN_LIBM(ndtr, 0.5 * std::erfc(-M_SQRT1_2 * x), 0.5 * M_SQRT1_2 * M_2_SQRTPI * std::exp(-0.5 * x * x))
TORCHLIN_LIBM(sin, std::sin(x), std::cos(x))
TORCHLIN_LIBM(cos, std::cos(x), -std::sin(x))
TORCHLIN_LIBM(sinc, x == 0 ? 1.0 : std::sin(x) / x, libm::sinc_slope(x, f))
TORCHLIN_LIBM(atan, std::atan(x), 1.0 / (1.0 + x * x))
TORCHLIN_LIBM(sinh, std::sinh(x), std::cosh(x))
TORCHLIN_LIBM(cosh, std::cosh(x), std::sinh(x))
TORCHLIN_LIBM(asinh, std::asinh(x), 1.0 / std::hypot(1.0, x))
TORCHLIN_LIBM(sech, libm::sech(x), -f * std::tanh(x))
TORCHLIN_LIBM(sqrt, std::sqrt(x), 0.5 / f)
TORCHLIN_LIBM(tanh_softplus, libm::tanh_softplus(x), libm::tanh_softplus_slope(x))
TORCHLIN_LIBM(log1p_sigmoid, std::log1p(libm::sigmoid(x)),
              libm::sigmoid(x) * libm::sigmoid(-x) / (1.0 + libm::sigmoid(x)))
#undef TORCHLIN_LIBM

TORCHLIN_INLINE D hypot(D k, D u) {
  D v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::hypot(k[i], u[i]);
  return v;
}
TORCHLIN_INLINE D pow(D u, D v) {
  D w;
  for (int i = 0; i < kLanes<double>; ++i) w[i] = std::pow(u[i], v[i]);
  return w;
}
TORCHLIN_INLINE D pow_by_base(D u, D v, D) { return v == 0.0 ? D{} : v * pow(u, v - 1.0); }
TORCHLIN_INLINE D pow_by_exponent(D u, D v, D power) {
  return (u == 0.0) & (v >= 0.0) ? D{} : power * log_pair(u).v;
}

// ---- the values alone ----

#define TORCHLIN_UNARY_NAMES(X)                                                                              \
  X(exp) X(expm1) X(log) X(log1p) X(tanh) X(sigmoid) X(softplus) X(erf) X(erfc) X(ndtr) X(sin) X(cos) X(sinc)        \
  X(atan) X(sinh) X(cosh) X(asinh) X(sech) X(sqrt) X(tanh_softplus) X(log1p_sigmoid)
#define TORCHLIN_VALUE(name)                                      \
  TORCHLIN_INLINE F name(F u) { return name##_pair(u).v; }        \
  TORCHLIN_INLINE D name(D u) { return name##_pair(u).v; }
TORCHLIN_UNARY_NAMES(TORCHLIN_VALUE)
#undef TORCHLIN_VALUE

}  // namespace tl
