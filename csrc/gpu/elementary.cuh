// The elementary functions of activations for one float, in namespace tl under the names that generated functors use
// (torchlin/catalogue/cpp_code.py lists them). Formulas and coefficients are those of simd/math.h, which says where they come
// from and how far they are right; exponentials and the reciprocals behind them come from the special function unit, which is
// right to a unit or two. No branches but for the far arguments of sin and cos. Include it inside a namespace, then simd/dual.h,
// after gpu/scalar.cuh: it needs no standard header, so that NVRTC takes it too.

namespace tl {

template <class T>
struct Pair {
  T v, d;  // a value and a derivative
};

// ---- constants and parameters ----

template <class T>
struct constant_of {
  using type = T;
};
template <class T>
using constant = typename constant_of<T>::type;

template <class T>
TORCHLIN_INLINE constexpr float lit(double c) {
  return static_cast<float>(c);
}
// The kernel's P decides what a slot is.
template <class T, class P>
TORCHLIN_INLINE auto arg(const P& p, int i, int j = 0) {
  return p.template arg<T>(i, j);
}
template <class P>
TORCHLIN_INLINE int length(const P& p, int i) {
  return p.length(i);
}

// ---- bits and selection ----

using gpu::as_float;
using gpu::as_int;
using gpu::fused;
using gpu::reciprocal;

constexpr float kInf = __builtin_huge_valf(), kNaN = __builtin_nanf("");

TORCHLIN_INLINE float with_sign_of(float magnitude, float u) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(u) & static_cast<int>(0x80000000u)));
}
TORCHLIN_INLINE float least(float a, float b) { return gpu::smaller(a, b); }
TORCHLIN_INLINE float most(float a, float b) { return gpu::larger(a, b); }

// c[0] + x (c[1] + x (c[2] + ...))
TORCHLIN_INLINE float poly(float, float c) { return c; }
template <class... Rest>
TORCHLIN_INLINE float poly(float x, float c, Rest... rest) {
  return fused(poly(x, rest...), x, c);
}

TORCHLIN_INLINE float abs(float u) { return as_float(as_int(u) & 0x7fffffff); }
TORCHLIN_INLINE float sign(float u) { return (u > 0.0f ? 1.0f : 0.0f) - (u < 0.0f ? 1.0f : 0.0f); }

// ---- exponentials ----

TORCHLIN_INLINE Pair<float> exp_pair(float u) {
  const float v = gpu::exponential(u);
  return {v, v};
}

// expm1 and exp of -86 <= x <= 89, both halved so that they do not overflow before sinh and the like.
struct HalfExpm1 {
  float minus_half, half;
};
template <bool kNonnegative = false>
TORCHLIN_INLINE HalfExpm1 half_expm1(float x) {
  constexpr float kMagic = 12582912.0f + 126.0f;
  const float scaled = kNonnegative ? fused(x, 1.4426950408889634f, -0.25f) : x * 1.4426950408889634f;
  const float sum = scaled + kMagic, n = sum - kMagic;
  const float r = fused(n, -3.1946335e-05f, fused(n, -0.693115234375f, x));
  const float g = kNonnegative ? poly(r, 5.000000000e-01f, 1.666666567e-01f, 4.166700318e-02f, 8.333104663e-03f,
                                      1.379437046e-03f, 2.288595133e-04f)
                               : poly(r, 5.000000000e-01f, 1.666654497e-01f, 4.166677594e-02f, 8.366472088e-03f,
                                      1.390568679e-03f);
  const float q = fused(r, r * g, r), s = as_float(as_int(sum) << 23);
  return {fused(s, q, s - 0.5f), fused(s, q, s)};
}

TORCHLIN_INLINE Pair<float> expm1_pair(float u) {
  const HalfExpm1 h = half_expm1(most(-86.0f, least(89.0f, u)));
  return {with_sign_of(h.minus_half + h.minus_half, u), u < -86.0f ? 0.0f : h.half + h.half};
}

// n/(n + 2) for 0 <= n < 1e38, and 1 minus it, without cancellation in either.
struct OverPlusTwo {
  float ratio, complement;
};
TORCHLIN_INLINE OverPlusTwo over_plus_two(float n) {
  const bool above = n > 2.0f;
  const float t = (above ? 2.0f : n) * reciprocal(n + 2.0f), other = 1.0f - t;
  return {above ? other : t, above ? t : other};
}

// With q = 1/(exp(2|u|) + 1), tanh |u| = 1 - 2 q, and the derivative is 4 q (1 - q): nothing cancels in that.
TORCHLIN_INLINE Pair<float> tanh_pair(float u) {
  const float a = abs(u), q = reciprocal(gpu::exponential(a + a) + 1.0f), z = u * u;
  // tanh u = u + u z T(z), |u| <= 0.6: 3e-9
  const float t = poly(z, -3.333329856e-01f, 1.333193630e-01f, -5.378471687e-02f, 2.079862542e-02f, -5.897966679e-03f);
  const float far = with_sign_of(fused(-2.0f, q, 1.0f), u);
  return {gpu::choose(a < 0.6f, fused(u * z, t, u), far), 4.0f * q * (1.0f - q)};
}

struct Sigmoid {
  float v, complement;
};
TORCHLIN_INLINE Sigmoid sigmoid_parts(float u) {
  const float e = gpu::exponential(-abs(u)), q = reciprocal(1.0f + e), p = e * q;
  const bool positive = u > 0.0f;
  return {positive ? q : p, positive ? p : q};
}
TORCHLIN_INLINE Pair<float> sigmoid_pair(float u) {
  const Sigmoid s = sigmoid_parts(u);
  return {s.v, s.v * s.complement};
}

// With n = e (e + 2), e = exp(u): tanh(log(1 + e)) = n/(n + 2), and its derivative is 4 e (e + 1)/(n + 2)^2.
TORCHLIN_INLINE Pair<float> tanh_softplus_pair(float u) {
  const float e = gpu::exponential(least(43.0f, u));
  const OverPlusTwo t = over_plus_two(e * (e + 2.0f));
  return {t.ratio, u >= 43.0f ? 0.0f : (e * t.complement) * ((e + 1.0f) * t.complement)};
}

TORCHLIN_INLINE Pair<float> sech_pair(float u) {
  const float e = gpu::exponential(-abs(u)), v = (e + e) * reciprocal(fused(e, e, 1.0f));
  return {v, -v * tanh_pair(u).v};
}

// sinh and cosh overflow later than exp: everything at a quarter.
TORCHLIN_INLINE Pair<float> cosh_sinh(float u) {
  const float a = abs(u), e = gpu::exponential(0.5f * a), quarter = (e * 0.25f) * e;
  const float small = half_expm1<true>(least(10.0f, a)).minus_half, whole = small + small;
  const float sinh = a < 9.0f ? fused(small, reciprocal(whole + 1.0f), small) : quarter + quarter;
  return {fused(0.125f, reciprocal(quarter), quarter + quarter), with_sign_of(sinh, u)};
}
TORCHLIN_INLINE Pair<float> cosh_pair(float u) { return cosh_sinh(u); }
TORCHLIN_INLINE Pair<float> sinh_pair(float u) {
  const Pair<float> both = cosh_sinh(u);
  return {both.d, both.v};
}

// ---- logarithms ----

// k ln 2 + log(1 + f) for f in [-1/3, 1/3].
TORCHLIN_INLINE float log_of_parts(float k, float f) {
  const float r = poly(f, -5.000000000e-01f, 3.333321214e-01f, -2.499983162e-01f, 2.001057714e-01f, -1.667896211e-01f,
                       1.400353312e-01f, -1.220517159e-01f, 1.399444193e-01f, -1.280185133e-01f);
  return fused(k, 0.693115234375f, fused(f, f * r, fused(k, 3.1946335e-05f, f)));
}
constexpr int kTwoThirds = 0x3f2aaaab;  // the bits of 2/3: [2/3, 4/3) has exponent 0

// log(1 + x), -1 < x < 2^126.
TORCHLIN_INLINE float log1p_core(float x) {
  const int k = (as_int(x + 1.0f) - kTwoThirds) >> 23;
  const float s = as_float(0x3f800000 - (k << 23));  // 2^-k
  return log_of_parts(static_cast<float>(k), fused(x, s, s - 1.0f));
}

TORCHLIN_INLINE Pair<float> log1p_pair(float u) {
  const bool big = u > 0x1p125f;
  float v = log1p_core(big ? u * 0.125f : u) + (big ? 2.0794415416798357f : 0.0f);
  v = u == kInf ? u : u <= -1.0f ? (u < -1.0f ? kNaN : -kInf) : v;
  return {with_sign_of(v, u), reciprocal(1.0f + u)};
}

TORCHLIN_INLINE Pair<float> log_pair(float u) {
  const bool tiny = u < 0x1p-126f;
  const float x = tiny ? u * 0x1p23f : u;
  const int e = (as_int(x) - kTwoThirds) >> 23;
  const float m = as_float(as_int(x) - (e << 23)), k = static_cast<float>(e) - (tiny ? 23.0f : 0.0f);
  float v = log_of_parts(k, m - 1.0f);
  v = u > 0.0f && u < kInf ? v : u == 0.0f ? -kInf : u < 0.0f ? kNaN : u;
  return {v, 1.0f / u};
}

// max(u, 0) + log1p(exp(-|u|)); where u > 0 the second is nothing beside the first beyond 20.
TORCHLIN_INLINE Pair<float> softplus_pair(float u) {
  const bool positive = u > 0.0f;
  const float e = gpu::exponential(-abs(u));
  return {(positive ? u : 0.0f) + log1p_core(e), (positive ? 1.0f : e) * reciprocal(1.0f + e)};
}

TORCHLIN_INLINE Pair<float> log1p_sigmoid_pair(float u) {
  const Sigmoid s = sigmoid_parts(u);
  return {log1p_core(s.v), s.v * s.complement * reciprocal(1.0f + s.v)};
}

// ---- roots ----

// One Newton step behind the approximation, which takes no subnormal number: those come scaled.
TORCHLIN_INLINE float root(float u) {
  const bool tiny = u < 0x1p-100f;
  const float x = tiny ? u * 0x1p60f : u, r = gpu::reciprocal_root(x), s = x * r;
  const float v = fused(fused(-s, s, x), 0.5f * r, s);
  return u == 0.0f || u == kInf ? u : tiny ? v * 0x1p-30f : v;
}
TORCHLIN_INLINE Pair<float> sqrt_pair(float u) {
  const float v = root(u);
  return {v, 0.5f * reciprocal(v)};
}

// Squares are taken beside 1: both numbers are divided by the power of two of the larger.
TORCHLIN_INLINE float hypot(float k, float u) {
  const float a = abs(k), b = abs(u), larger = b <= a ? a : b;
  int e = as_int(larger) & 0x7f800000;
  e = e > (252 << 23) ? 252 << 23 : e;
  e = e < (1 << 23) ? 1 << 23 : e;
  const float down = as_float((254 << 23) - e), up = as_float(e), x = a * down, y = b * down;
  const float square = fused(x, x, y * y), r = gpu::reciprocal_root(square), s = square * r;
  const float v = fused(fused(-s, s, square), 0.5f * r, s);
  return (square == 0.0f || square == kInf ? square : v) * up;
}

TORCHLIN_INLINE Pair<float> asinh_pair(float u) {
  const float a = abs(u);
  const bool big = a > 0x1p30f;
  const float small = fused(a, a * reciprocal(1.0f + root(fused(a, a, 1.0f))), a);
  const float v = big ? log_pair(a).v + 0.6931471805599453f : log1p_core(big ? 1.0f : small);
  return {with_sign_of(v, u), reciprocal(hypot(1.0f, u))};
}

// ---- erf and erfc ----

// exp(x + low) for x <= 0 with |low| far below 1: what it is worth in the last places of x.
TORCHLIN_INLINE float exponential_of_sum(float x, float low) {
  constexpr float kMagic = 12582912.0f;
  const float y = most(-150.0f, x), sum = fused(y, 1.4426950408889634f, kMagic), n = sum - kMagic;
  const float r = fused(n, -3.1946335e-05f, fused(n, -0.693115234375f, y)) + low;
  // 2^n in two factors, so that a subnormal result is rounded once.
  const int half = (as_int(sum) << 22) & static_cast<int>(0xff800000u), rest = (as_int(sum) << 23) - half;
  return (gpu::exponential2(r * 1.4426950408889634f) * as_float(rest + (127 << 23))) * as_float(half + (127 << 23));
}

// erfc(a) = square g for a in [0, 10.2], square = exp(-a^2).
struct Erfc {
  float square, g;
};
TORCHLIN_INLINE Erfc erfc_parts(float a) {
  // a^2 as the square of its upper half, which is exact, and the rest: its rounding error would be 100 units of the result.
  const float upper = as_float(as_int(a) & ~0xfff), rest = (a - upper) * (a + upper);
  // g = t Q(1 - 6 t), t = 1/(a + 3). An error of t is tripled in g: t and y are to be right to their last places.
  const float sum = a + 3.0f, lost = a - (sum - 3.0f), near = reciprocal(sum);
  const float correction = near * (fused(-near, sum, 1.0f) - lost * near);
  const float t = near + correction, y = fused(-6.0f, near, 1.0f) - 6.0f * correction;
  const float q = poly(y, 1.074006915e+00f, -8.833944798e-01f, 5.902280211e-01f, -3.104660213e-01f, 1.195313483e-01f,
                       -2.683952451e-02f, -1.233430346e-03f, 3.077646252e-03f, -4.756601702e-04f, -3.204217064e-04f);
  return {exponential_of_sum(-(upper * upper), -rest), t * q};
}
constexpr float kTwoOverRootPi = 1.1283791670955126f;

// erf a = a + a P(a^2), |a| <= 1
TORCHLIN_INLINE float erf_small(float a) {
  const float p = poly(a * a, 1.283791661e-01f, -3.761262596e-01f, 1.128358245e-01f, -2.685364336e-02f, 5.187962670e-03f,
                       -8.006793214e-04f, 7.842288323e-05f);
  return fused(a, p, a);
}

TORCHLIN_INLINE Pair<float> erfc_pair(float u) {
  const float a = least(10.2f, abs(u));
  const Erfc c = erfc_parts(a);
  const float tail = c.square * c.g, far = u < 0.0f ? 2.0f - tail : tail;
  return {gpu::choose(a < 0.81f, 1.0f - erf_small(u), far), -kTwoOverRootPi * c.square};
}

TORCHLIN_INLINE Pair<float> erf_pair(float u) {
  const float a = least(10.2f, abs(u));
  const Erfc c = erfc_parts(a);
  return {with_sign_of(gpu::choose(a < 1.0f, erf_small(a), fused(-c.square, c.g, 1.0f)), u), kTwoOverRootPi * c.square};
}

// The square of u itself is exact, of u sqrt(1/2) it would not be.
TORCHLIN_INLINE Pair<float> ndtr_pair(float u) {
  const float a = least(14.4f, abs(u)), half = -0.5f * a, x = half * a;
  const float square = exponential_of_sum(x, fused(half, a, -x)), tail = 0.5f * square * erfc_parts(a * 0.7071067811865476f).g;
  return {u > 0.0f ? 1.0f - tail : tail, 0.3989422804014327f * square};
}

// ---- trigonometry ----

// u = n pi/2 + r, |r| <= pi/4: n modulo 4 and r.
struct Reduced {
  int quadrant;
  float r;
};

// 2/pi, the binary point behind the first word.
__constant__ const uint32_t kTwoOverPi[8] = {0,          0xa2f9836e, 0x4e441529, 0xfc2757d1,
                                             0xf534ddc0, 0xdb629599, 0x3c439041, 0xfe5163ab};

// Payne and Hanek: u 2/pi modulo 4, of which only 96 bits of 2/pi can have a part.
TORCHLIN_INLINE Reduced reduce_far(float u) {
  const uint32_t bits = gpu::bit_cast<uint32_t>(u), first = (bits >> 23 & 0xff) - 120, m = (bits & 0x7fffff) | 0x800000;
  const uint32_t* w = kTwoOverPi + (first >> 5);
  const uint32_t a = gpu::funnel_left(w[1], w[0], first), b = gpu::funnel_left(w[2], w[1], first),
                 c = gpu::funnel_left(w[3], w[2], first);
  const uint64_t turns = (uint64_t{m * a} << 32) + uint64_t{m} * b + (uint64_t{m} * c >> 32);  // in units of 2^-62
  const int quadrant = static_cast<int>((turns + (uint64_t{1} << 61)) >> 62);
  const float r = static_cast<float>(static_cast<int64_t>(turns << 2)) * 8.515303950e-20f;
  return {u < 0.0f ? -quadrant : quadrant, abs(u) < kInf ? (u < 0.0f ? -r : r) : kNaN};
}

TORCHLIN_INLINE Reduced reduce(float u) {
  if (!(abs(u) <= 8192.0f)) return reduce_far(u);
  constexpr float kMagic = 12582912.0f;
  const float sum = fused(u, 0.6366197723675814f, kMagic), n = sum - kMagic;
  // pi/2 in three floats. The first difference is exact, since u and n times the first part are close.
  float r = fused(n, -0x1.921fb6p+0f, u);
  r = fused(n, 0x1.777a5cp-25f, r);
  return {as_int(sum), fused(n, 0x1.ee59dap-50f, r)};
}

struct SinCos {
  float sin, cos;
};
TORCHLIN_INLINE SinCos sin_cos(float u) {
  const Reduced x = reduce(u);
  const float r = x.r, z = r * r;
  const float sin = fused(r, z * poly(z, -1.666665524e-01f, 8.332184516e-03f, -1.951720624e-04f), r);
  const float cos = fused(z * z, poly(z, 4.166664556e-02f, -1.388730831e-03f, 2.443202720e-05f), fused(-0.5f, z, 1.0f));
  const bool odd = x.quadrant & 1;
  const float s = odd ? cos : sin, c = odd ? sin : cos;
  return {as_float(as_int(s) ^ (x.quadrant & 2) << 30), as_float(as_int(c) ^ ((x.quadrant + 1) & 2) << 30)};
}
TORCHLIN_INLINE Pair<float> sin_pair(float u) {
  const SinCos both = sin_cos(u);
  return {u == 0.0f ? u : both.sin, both.cos};
}
TORCHLIN_INLINE Pair<float> cos_pair(float u) {
  const SinCos both = sin_cos(u);
  return {both.cos, -both.sin};
}
TORCHLIN_INLINE Pair<float> sinc_pair(float u) {
  const SinCos both = sin_cos(u);
  const bool zero = u == 0.0f;
  const float inverse = 1.0f / (zero ? 1.0f : u), v = zero ? 1.0f : both.sin * inverse;
  // (cos u - sinc u)/u cancels near 0: its series, with an error of 3e-8 at 1
  const float z = u * u, near = u * poly(z, -1.0f / 3, 1.0f / 30, -1.0f / 840, 1.0f / 45360, -1.0f / 3991680);
  return {v, abs(u) < 1.0f ? near : (both.cos - v) * inverse};
}

TORCHLIN_INLINE Pair<float> atan_pair(float u) {
  const float a = abs(u);
  const bool outer = a > 1.0f;
  const float t = outer ? -reciprocal(a) : a, z = t * t;
  const float tail = poly(z, -3.333329856e-01f, 1.999853104e-01f, -1.426405013e-01f, 1.095115393e-01f, -8.400370926e-02f,
                          5.790401995e-02f, -3.112378903e-02f, 1.088529080e-02f, -1.787013840e-03f);
  const float p = fused(t, z * tail, t);
  return {with_sign_of(outer ? (p - 4.371139e-08f) + 1.5707964f : p, u), reciprocal(fused(u, u, 1.0f))};
}

// ---- powers ----

TORCHLIN_INLINE float pow(float u, float v) { return gpu::power(u, v); }
// Derivatives of pow by u and by v.
TORCHLIN_INLINE float pow_by_base(float u, float v, float) { return v == 0.0f ? 0.0f : v * pow(u, v - 1.0f); }
TORCHLIN_INLINE float pow_by_exponent(float u, float v, float power) {
  return u == 0.0f && v >= 0.0f ? 0.0f : power * log_pair(u).v;
}

// ---- the values alone ----

#define TORCHLIN_UNARY_NAMES(X)                                                                              \
  X(exp) X(expm1) X(log) X(log1p) X(tanh) X(sigmoid) X(softplus) X(erf) X(erfc) X(ndtr) X(sin) X(cos) X(sinc)        \
  X(atan) X(sinh) X(cosh) X(asinh) X(sech) X(sqrt) X(tanh_softplus) X(log1p_sigmoid)
#define TORCHLIN_VALUE(name) \
  TORCHLIN_INLINE float name(float u) { return name##_pair(u).v; }
TORCHLIN_UNARY_NAMES(TORCHLIN_VALUE)
#undef TORCHLIN_VALUE

}  // namespace tl
