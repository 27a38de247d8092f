// The functions as loops over arrays, for each level. Each value is computed twice, as itself and as part of a dual number;
// where the two differ the derivative is reported as -12345.
#include "simd/math.h"
#include "simd/dual.h"

#undef TORCHLIN_FUNCTOR
#define TORCHLIN_FUNCTOR TORCHLIN_INLINE
namespace tl {
#include "activation/reductions.h"
}

template <class C>
struct Constants {
  const tests::Call& call;
  template <class T>
  TORCHLIN_INLINE tl::constant<T> arg(int i, int j) const {
    return splat(static_cast<const C*>(call.values)[call.offset[i] + j]);
  }
  int length(int i) const { return call.size[i]; }
};

template <class C, class Vec, int N>
TORCHLIN_INLINE void put(const tests::Call& call, int64_t at, Vec f, tl::Dual<Vec, N> u) {
  const int64_t left = std::min<int64_t>(call.n - at, kLanes<C>);
  store_n(static_cast<C*>(call.f) + at, f, left);
  for (int i = 0; i < N; ++i) {
    const Vec same = (f == u.v) | ((f != f) & (u.v != u.v)) ? u.d[i] : tl::lit<Vec>(-12345.0);
    store_n(static_cast<C*>(call.d) + i * call.n + at, same, left);
  }
}

template <class C, class Op>
void over_points(const tests::Call& call) {
  using Vec = V<C>;
  using Dual = tl::Dual<Vec, Op::variables>;
  const C* x = static_cast<const C*>(call.x[0]);
  const C* y = static_cast<const C*>(call.x[1] ? call.x[1] : call.x[0]);
  const C* z = static_cast<const C*>(call.x[2] ? call.x[2] : call.x[0]);
  for (int64_t at = 0; at < call.n; at += kLanes<C>) {
    const int64_t left = std::min<int64_t>(call.n - at, kLanes<C>);
    const Vec u = load_n(x + at, left), v = load_n(y + at, left), w = load_n(z + at, left);
    const Constants<C> p{call};
    const auto variable = [](Vec value, int which) {
      if constexpr (Op::variables > 1) return which < Op::variables ? Dual::variable(value, which) : Dual(value);
      else return value;
    };
    put<C>(call, at, Vec(Op::template f<Vec>(u, v, w, p)),
           Dual(Op::template f<Dual>(Dual::variable(u), variable(v, 1), variable(w, 2), p)));
  }
}

template <class K>
struct Functor {
  static constexpr int variables = K::inputs;
  template <class T, class A, class P>
  TORCHLIN_INLINE static auto f(T x, A y, A z, const P& p) {
    if constexpr (K::inputs == 1) return K::f(x, p);
    else if constexpr (K::inputs == 2) return K::template f<T>(x, y, p);
    else return K::template f<T>(x, y, z, p);
  }
};

#define UNARY(name)                                                           \
  struct Of_##name {                                                          \
    static constexpr int variables = 1;                                       \
    template <class T, class A, class P>                                      \
    TORCHLIN_INLINE static T f(T x, A, A, const P&) {                         \
      return tl::name(x);                                                     \
    }                                                                         \
  };
TORCHLIN_UNARY_NAMES(UNARY)
UNARY(abs)
UNARY(sign)
#undef UNARY
#define BINARY(name, expression) OF_VARIABLES(1, name, expression)
#define OF_VARIABLES(n, name, expression)                                     \
  struct Of_##name {                                                          \
    static constexpr int variables = n;                                       \
    template <class T, class A, class P>                                      \
    TORCHLIN_INLINE static T f(T x, A y, A z, const P&) {                     \
      (void)z;                                                                \
      return expression;                                                      \
    }                                                                         \
  };
BINARY(max, tl::max(x, y))
BINARY(max_of_constant, tl::max(y, x))
BINARY(min, tl::min(x, y))
BINARY(min_of_constant, tl::min(y, x))
BINARY(clamp, tl::clamp(x, y, z))
BINARY(hypot, tl::hypot(x, y))
BINARY(pow, tl::pow(x, y))
BINARY(pow_of_constant, tl::pow(y, x))
BINARY(where_gt, tl::where(tl::gt(x, y), x * x, z))
BINARY(ste, tl::ste(tl::sign(x), x * y))
#undef BINARY
// Derivatives by all arguments at once.
OF_VARIABLES(2, max_of_two, tl::max(x, y))
OF_VARIABLES(2, min_of_two, tl::min(x, y))
OF_VARIABLES(2, hypot_of_two, tl::hypot(x, y))
OF_VARIABLES(2, pow_of_two, tl::pow(x, y))
OF_VARIABLES(3, clamp_of_three, tl::clamp(x, y, z))
OF_VARIABLES(3, where_of_three, tl::where(tl::gt(x, y), x * y, -z))
OF_VARIABLES(3, arithmetic_of_three, (x - y) / (y * z) + tl::tanh(x * z))
#undef OF_VARIABLES

#define TORCHLIN_BINARY_NAMES(X) \
  X(max) X(max_of_constant) X(min) X(min_of_constant) X(clamp) X(hypot) X(pow) X(pow_of_constant) X(where_gt) X(ste) \
  X(max_of_two) X(min_of_two) X(hypot_of_two) X(pow_of_two) X(clamp_of_three) X(where_of_three) X(arithmetic_of_three)

#if TORCHLIN_ISA_BYTES == TORCHLIN_TEST_FUNCTORS
#include "kernels.inc"
#include "shard_00.inc"
#endif

template <class C>
tests::Function find(const std::string& name) {
#define CASE(label) \
  if (name == #label) return {over_points<C, Of_##label>, Of_##label::variables};
  TORCHLIN_UNARY_NAMES(CASE)
  TORCHLIN_BINARY_NAMES(CASE)
  CASE(abs)
  CASE(sign)
#undef CASE
#if TORCHLIN_ISA_BYTES == TORCHLIN_TEST_FUNCTORS
#define CASE(K, label, id, inputs, slots) \
  if (name == "K_" label) return {over_points<C, Functor<K>>, Functor<K>::variables};
  if constexpr (std::is_same_v<C, float>) {
    TORCHLIN_KERNELS(CASE)
  }
#undef CASE
#endif
  return {};
}
#undef TORCHLIN_BINARY_NAMES
