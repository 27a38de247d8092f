// The three-point loss of samples, and its gradient, in three passes over the three rows of a sample while they are in cache:
// maximum; exponentials, which stay in the gradient's memory; and a multiplication. What is one number a row is a double: the
// loss is one digit away from its chord where a network is nearly linear.

#include "simd/math.h"

namespace {  // other families have a kKernels, too

using linearity::Base;
using linearity::Job;
using linearity::Penalty;

// ---- the end of a row ----

template <class C>
using Lanes = V<std::conditional_t<sizeof(C) == 8, int64_t, int32_t>>;

template <class C, class I, I... i>
TORCHLIN_INLINE Lanes<C> lanes_below(int64_t n, std::integer_sequence<I, i...>) {
  return Lanes<C>{i...} < static_cast<I>(n);
}
// All bits of the first n lanes.
template <class C>
TORCHLIN_INLINE Lanes<C> lanes_below(int64_t n) {
  using I = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  return lanes_below<C>(n, std::make_integer_sequence<I, kLanes<C>>{});
}

// The first n lanes, and `rest` in the others.
template <class C>
TORCHLIN_INLINE V<C> load_some(const C* p, int64_t n, C rest) {
#if TORCHLIN_ISA_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    return (V<C>)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    return (V<C>)_mm512_mask_loadu_pd(_mm512_set1_pd(rest), static_cast<__mmask8>((1u << n) - 1), p);
  }
#elif TORCHLIN_ISA_BYTES == 32
  const Lanes<C> mask = lanes_below<C>(n);
  if constexpr (sizeof(C) == 4) {
    return mask ? (V<C>)_mm256_maskload_ps(p, (__m256i)mask) : splat(rest);
  } else {
    return mask ? (V<C>)_mm256_maskload_pd(p, (__m256i)mask) : splat(rest);
  }
#else
  return lanes_below<C>(n) ? load_n(p, n) : splat(rest);
#endif
}
template <class C>
TORCHLIN_INLINE void store_some(C* p, V<C> v, int64_t n) {
#if TORCHLIN_ISA_BYTES == 64
  if constexpr (sizeof(C) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#elif TORCHLIN_ISA_BYTES == 32
  const __m256i mask = (__m256i)lanes_below<C>(n);
  if constexpr (sizeof(C) == 4) _mm256_maskstore_ps(p, mask, (__m256)v);
  else _mm256_maskstore_pd(p, mask, (__m256d)v);
#else
  store_n(p, v, n);
#endif
}

// ---- across lanes ----

template <int Mask, class C, class F>
TORCHLIN_INLINE C across(V<C> v, const F& f) {
  if constexpr (Mask == 0) return v[0];
  else return across<Mask / 2, C>(f(v, shuffle_xor<C, Mask>(v)), f);
}
template <class C>
TORCHLIN_INLINE C largest(V<C> v) {
  return across<kLanes<C> / 2, C>(v, [&](V<C> a, V<C> b) __attribute__((always_inline)) { return tl::most(a, b); });
}

// Sums in double, of floats in two vectors.
struct WideSum {
  V<double> low{}, high{};
  TORCHLIN_INLINE void add(V<double> v) { low += v; }
  template <class F>
  TORCHLIN_INLINE void add(V<float> v, const F& f) {
    typename vector_of<float, kLanes<double>>::type half[2];
    std::memcpy(half, &v, sizeof v);
    low += f(__builtin_convertvector(half[0], V<double>), 0);
    high += f(__builtin_convertvector(half[1], V<double>), 1);
  }
  TORCHLIN_INLINE void add(V<float> v) {
    add(v, [&](V<double> half, int) __attribute__((always_inline)) { return half; });
  }
  TORCHLIN_INLINE double total() const {
    const auto plus = [&](V<double> a, V<double> b) __attribute__((always_inline)) { return a + b; };
    return across<kLanes<double> / 2, double>(low + high, plus);
  }
};
// t z, and 0 where t is, whatever z.
TORCHLIN_INLINE V<double> weighted(V<double> t, V<double> z) { return t == 0 ? V<double>{} : t * z; }
TORCHLIN_INLINE void add_product(WideSum& sum, V<double> t, V<double> z) { sum.add(weighted(t, z)); }
TORCHLIN_INLINE void add_product(WideSum& sum, V<float> t, V<float> z) {
  typename vector_of<float, kLanes<double>>::type half[2];
  std::memcpy(half, &t, sizeof t);
  sum.add(z, [&](V<double> z_half, int which) __attribute__((always_inline)) {
    return weighted(__builtin_convertvector(half[which], V<double>), z_half);
  });
}

// ---- the passes ----

constexpr int kChains = 4;      // independent accumulators
constexpr int64_t kLine = 64;   // bytes
constexpr int64_t kBlock = 16;  // of their sums that are added in float

template <class C, Base kBase>
struct First {
  C top;         // the largest logit; where one is NaN, that or any other
  double inner;  // of logits and base: their sum for a constant one
};
template <class C, Base kBase>
TORCHLIN_INLINE First<C, kBase> first_pass(const C* z, [[maybe_unused]] const C* base, int64_t n) {
  constexpr int64_t W = kLanes<C>;
  const C lowest = -std::numeric_limits<C>::infinity();
  V<C> top[kChains];
  unroll<kChains>([&](int j) __attribute__((always_inline)) { top[j] = splat(lowest); });
  [[maybe_unused]] WideSum inner;
  const auto take = [&](int j, V<C> v, [[maybe_unused]] int64_t at, [[maybe_unused]] int64_t count) __attribute__((always_inline)) {
    top[j] = tl::most(top[j], v);
    if constexpr (kBase == Base::constant) inner.add(count < W ? lanes_below<C>(count) ? v : V<C>{} : v);
    if constexpr (kBase == Base::row) add_product(inner, count < W ? load_some(base + at, count, C(0)) : load(base + at), v);
  };
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W) {
    unroll<kChains>([&](int j) __attribute__((always_inline)) { take(j, load(z + i + j * W), i + j * W, W); });
  }
  for (; i + W <= n; i += W) take(0, load(z + i), i, W);
  if (i < n) take(1, load_some(z + i, n - i, lowest), i, n - i);
  First<C, kBase> out{};
  out.top = largest<C>(tl::most(tl::most(top[0], top[1]), tl::most(top[2], top[3])));
  if constexpr (kBase != Base::none) out.inner = inner.total();
  return out;
}

// exp(x) for x <= 0, or NaN.
TORCHLIN_INLINE V<float> exp_below(V<float> x) { return tl::exp_core(x); }
TORCHLIN_INLINE V<double> exp_below(V<double> x) { return tl::exp_pair(x).v; }

// The sum of exp(z - top); the terms to e if that is wanted, in whole vectors if e has room for them. What comes next, next_z
// and next_e, is fetched meanwhile.
template <class C, bool kKeep, bool kRoom>
TORCHLIN_INLINE WideSum exponentials(const C* z, C top, [[maybe_unused]] C* e, int64_t n, [[maybe_unused]] const C* next_z,
                                     [[maybe_unused]] C* next_e) {
  constexpr int64_t W = kLanes<C>;
  V<C> part[kChains];
  WideSum sum;
  const auto flush = [&]() __attribute__((always_inline)) {
    sum.add((part[0] + part[1]) + (part[2] + part[3]));
    unroll<kChains>([&](int j) __attribute__((always_inline)) { part[j] = V<C>{}; });
  };
  unroll<kChains>([&](int j) __attribute__((always_inline)) { part[j] = V<C>{}; });
  int64_t i = 0;
  while (i + kChains * W <= n) {
    const int64_t end = std::min(n - kChains * W, i + (kBlock - 1) * kChains * W);
    for (; i <= end; i += kChains * W) {
      if constexpr (!kRoom) {
        for (int64_t line = 0; line < kChains * W * static_cast<int64_t>(sizeof(C)); line += kLine) {
          __builtin_prefetch(reinterpret_cast<const char*>(next_z + i) + line, 0, 2);
          if constexpr (kKeep) __builtin_prefetch(reinterpret_cast<const char*>(next_e + i) + line, 1, 2);
        }
      }
      unroll<kChains>([&](int j) __attribute__((always_inline)) {
        const V<C> v = exp_below(load(z + i + j * W) - top);
        if constexpr (kKeep) store(e + i + j * W, v);
        part[j] += v;
      });
    }
    flush();
  }
  for (; i + W <= n; i += W) {
    const V<C> v = exp_below(load(z + i) - top);
    if constexpr (kKeep) store(e + i, v);
    part[0] += v;
  }
  if (i < n) {
    const V<C> v = exp_below(load_some(z + i, n - i, top) - top);  // what is not there counts as nothing below
    if constexpr (kKeep && kRoom) store(e + i, v);
    if constexpr (kKeep && !kRoom) store_some(e + i, v, n - i);
    part[1] += lanes_below<C>(n - i) ? v : V<C>{};
  }
  flush();
  return sum;
}

// out = c e - q base; they may be one, or e has room for whole vectors.
template <class C, Base kBase, bool kRoom>
TORCHLIN_INLINE void last_pass(C* out, const C* e, [[maybe_unused]] const C* base, int64_t n, double c, [[maybe_unused]] double q) {
  constexpr int64_t W = kLanes<C>;
  const C factor = static_cast<C>(c), share = static_cast<C>(q);
  const auto of = [&](V<C> v, [[maybe_unused]] int64_t at, [[maybe_unused]] int64_t count) __attribute__((always_inline)) {
    if constexpr (kBase == Base::none) return v * factor;
    else if constexpr (kBase == Base::constant) return v * factor - share;
    else return v * factor - (count < W ? load_some(base + at, count, C(0)) : load(base + at)) * share;
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, of(load(e + i), i, W));
  if (i < n) store_some(out + i, of(kRoom ? load(e + i) : load_some(e + i, n - i, C(0)), i, n - i), n - i);
}

// ---- one sample ----

struct Curve {
  double value, slope;
};
TORCHLIN_INLINE Curve penalize(Penalty penalty, double beta, double r) {
  if (penalty == Penalty::square) return {r * r, 2 * r};
  const double size = std::fabs(r), sign = r != r ? r : static_cast<double>(r > 0) - static_cast<double>(r < 0);
  if (penalty == Penalty::abs) return {size, sign};
  if (size < beta) return {r * r * (0.5 / beta), r / beta};
  return {size - 0.5 * beta, sign};
}

// A class that a label names, and its part of T.
struct Named {
  int64_t at;
  double share;
};

template <class C>
struct Target {
  Named named[2];
  int count;
  double base;  // each class's, if constant
  const C* row;
  double base_total, total;

  double at(int64_t k, Base kind) const {
    double t = kind == Base::none ? 0 : kind == Base::constant ? base : static_cast<double>(row[k]);
    for (int j = 0; j < count; ++j) t += named[j].at == k ? named[j].share : 0;
    return t;
  }
};

// Rows up to which exponentials stay on the stack, in whole vectors: what was just stored under a mask can be loaded again only
// after a while, which is most of a short row's time.
constexpr int64_t kShort = 256;

template <class C, Base kBase, bool kGradient, bool kRoom>
void run_sample(const Job& job, int64_t i, const Target<C>& target) {
  const int64_t n = job.classes, samples = job.samples, next = i + 1 < samples ? i + 1 : i;
  const C* z[3];
  C *out[3], *e[3];
  alignas(64) [[maybe_unused]] C room[kRoom && kGradient ? 3 * kShort : 1];
  First<C, kBase> first[3];
  WideSum parts[3];
  double sum[3], loss[3];
  for (int t = 0; t < 3; ++t) {
    z[t] = static_cast<const C*>(job.logits[t]) + i * job.row_step[t];
    out[t] = kGradient ? static_cast<C*>(job.dlogits) + (t * samples + i) * n : nullptr;
    e[t] = kRoom && kGradient ? room + t * kShort : out[t];
  }
  if constexpr (kRoom) {  // pass by pass: what ends a pass is a chain of operations, whose time three rows can share
    for (int t = 0; t < 3; ++t) first[t] = first_pass<C, kBase>(z[t], target.row, n);
    for (int t = 0; t < 3; ++t) parts[t] = exponentials<C, kGradient, true>(z[t], first[t].top, e[t], n, nullptr, nullptr);
  } else {  // row by row, so that the next one can be fetched
    for (int t = 0; t < 3; ++t) {
      const int64_t of = t < 2 ? i : next;
      const int next_t = (t + 1) % 3;
      const C* next_z = static_cast<const C*>(job.logits[next_t]) + of * job.row_step[next_t];
      C* next_e = kGradient ? static_cast<C*>(job.dlogits) + (next_t * samples + of) * n : nullptr;
      first[t] = first_pass<C, kBase>(z[t], target.row, n);
      parts[t] = exponentials<C, kGradient, false>(z[t], first[t].top, e[t], n, next_z, next_e);
    }
  }
  for (int t = 0; t < 3; ++t) sum[t] = parts[t].total();
  for (int t = 0; t < 3; ++t) {
    // By differences from the largest logit: of one class all of them are 0.
    const double top = static_cast<double>(first[t].top), log_sum = std::log(sum[t]);
    loss[t] = 0;
    if constexpr (kBase == Base::constant) {
      const double count = static_cast<double>(n);
      loss[t] = target.base * (count * log_sum - (first[t].inner - count * top));
    }
    if constexpr (kBase == Base::row) loss[t] = target.base_total * (top + log_sum) - first[t].inner;
    for (int j = 0; j < target.count; ++j) {
      const Named& named = target.named[j];
      if (named.share != 0) loss[t] += named.share * (log_sum - (static_cast<double>(z[t][named.at]) - top));
    }
    if (sum[t] != sum[t]) loss[t] = sum[t];
    if (job.losses != nullptr) static_cast<C*>(job.losses)[t * samples + i] = static_cast<C>(loss[t]);
  }
  const double mix = static_cast<double>(static_cast<const C*>(job.mix)[i * job.mix_step]);
  const double r = (loss[2] - loss[0]) - mix * (loss[1] - loss[0]);
  const Curve h = penalize(job.penalty, job.beta, r);
  if (job.penalties != nullptr) job.penalties[i] = h.value;
  if constexpr (kGradient) {
    const double g = job.grad_value == nullptr ? 1 : static_cast<double>(static_cast<const C*>(job.grad_value)[i * job.grad_value_step]);
    const double rho = g * job.scale * h.slope, part[3] = {(mix - 1) * rho, -mix * rho, rho};
    if (job.dmix != nullptr) static_cast<C*>(job.dmix)[i] = static_cast<C>(rho * (loss[0] - loss[1]));
    for (int t = 0; t < 3; ++t) {
      double q = part[t];
      if (job.grad_losses != nullptr) q += static_cast<double>(static_cast<const C*>(job.grad_losses)[t * samples + i]);
      const double c = q * target.total / sum[t];
      C named[2] = {};
      for (int j = 0; j < target.count; ++j) {
        const int64_t k = target.named[j].at;
        named[j] = static_cast<C>(c * static_cast<double>(e[t][k]) - q * target.at(k, kBase));
      }
      last_pass<C, kBase, kRoom>(out[t], e[t], target.row, n, c, kBase == Base::constant ? q * target.base : q);
      for (int j = 0; j < target.count; ++j) out[t][target.named[j].at] = named[j];
    }
  }
}

template <class C>
void clear_sample(const Job& job, int64_t i) {
  if (job.penalties != nullptr) job.penalties[i] = 0;
  if (job.dmix != nullptr) static_cast<C*>(job.dmix)[i] = 0;
  for (int64_t t = 0; t < 3; ++t) {
    const int64_t row = t * job.samples + i;
    if (job.losses != nullptr) static_cast<C*>(job.losses)[row] = 0;
    if (job.dlogits != nullptr) std::fill_n(static_cast<C*>(job.dlogits) + row * job.classes, job.classes, C(0));
  }
}

// The part of T that has no label: (1 - s) p + s/K, times the weight. `p` may be null, for 0. Returns its sum.
template <class C>
double write_row(C* row, const C* p, const C* weight, double smoothing, int64_t n) {
  const C kept = static_cast<C>(1 - smoothing), spread = static_cast<C>(smoothing / static_cast<double>(n));
  double total = 0;
  for (int64_t k = 0; k < n; ++k) {
    C t = p == nullptr ? spread : smoothing != 0 ? kept * p[k] + spread : p[k];
    if (weight != nullptr && t != 0) t *= weight[k];
    row[k] = t;
    total += static_cast<double>(t);
  }
  return total;
}

template <class C, Base kBase, bool kGradient, bool kRoom>
void run_samples(const Job& job, int64_t begin, int64_t end) {
  const int64_t n = job.classes;
  const C *dense = static_cast<const C*>(job.dense), *weight = static_cast<const C*>(job.weight);
  C* row = nullptr;
  Target<C> target{};
  if constexpr (kBase == Base::constant) {
    target.base = job.smoothing / static_cast<double>(n);
    target.base_total = target.base * static_cast<double>(n);
  }
  if constexpr (kBase == Base::row) {
    target.row = row = linearity::Scratch::get<C>(linearity::Purpose::kTarget, n);
    if (dense == nullptr) target.base_total = write_row<C>(row, nullptr, weight, job.smoothing, n);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (dense != nullptr) {
      target.total = target.base_total = write_row(row, dense + i * n, weight, job.smoothing, n);
    } else {
      const int64_t labels[2] = {job.labels[i], job.others != nullptr ? job.others[i] : job.labels[i]};
      if (labels[0] == job.ignore_index || labels[1] == job.ignore_index) {
        clear_sample<C>(job, i);
        continue;
      }
      const double lam = job.others == nullptr ? 1 : static_cast<double>(static_cast<const C*>(job.lam)[i * job.lam_step]);
      target.total = target.base_total;
      target.count = job.others == nullptr ? 1 : 2;
      for (int j = 0; j < target.count; ++j) {
        double share = (1 - job.smoothing) * (j == 0 ? lam : 1 - lam);
        if (weight != nullptr && share != 0) share *= static_cast<double>(weight[labels[j]]);
        target.named[j] = {labels[j], share};
        target.total += share;
      }
    }
    run_sample<C, kBase, kGradient, kRoom>(job, i, target);
  }
}

template <class C>
void run(const Job& job, int64_t begin, int64_t end) {
  const auto of_base = [&](auto base) {
    constexpr Base kBase = decltype(base)::value;
    const bool room = job.classes <= kShort, gradient = job.dlogits != nullptr;
    if (room && gradient) run_samples<C, kBase, true, true>(job, begin, end);
    else if (room) run_samples<C, kBase, false, true>(job, begin, end);
    else if (gradient) run_samples<C, kBase, true, false>(job, begin, end);
    else run_samples<C, kBase, false, false>(job, begin, end);
  };
  if (job.dense != nullptr || (job.smoothing != 0 && job.weight != nullptr)) {
    of_base(std::integral_constant<Base, Base::row>{});
  } else if (job.smoothing != 0) {
    of_base(std::integral_constant<Base, Base::constant>{});
  } else {
    of_base(std::integral_constant<Base, Base::none>{});
  }
}

template <class C>
void scale(void* rows, int64_t width, const void* factor, int64_t step, int64_t samples, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const C by = static_cast<const C*>(factor)[r % samples * step];
    if (by != C(1)) last_pass<C, Base::none, false>(static_cast<C*>(rows) + r * width, static_cast<C*>(rows) + r * width, nullptr, width, static_cast<double>(by), 0);
  }
}

inline constexpr linearity::Kernel kKernels[] = {{&run<float>, &scale<float>}, {&run<double>, &scale<double>}};

}  // namespace
