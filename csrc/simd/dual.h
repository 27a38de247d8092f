// Dual numbers over the vectors of math.h, after which a level's namespace includes this: a value and its derivatives by N
// variables, under the same names in tl. A plain vector beside a dual number is a constant: it mixes with it everywhere and
// takes part in no derivative, so that 0 * inf does not arise from it. Just so a dual number, by its type, depends on some
// of the variables only. The value is that of math.h, bit for bit.

namespace tl {

template <class Vec, int N = 1, unsigned Mask = (1u << N) - 1>
struct Dual {
  using value_type = Vec;
  static constexpr int variables = N;
  static constexpr unsigned mask = Mask;  // bit i: depends on variable i; d[i] is not looked at otherwise
  Vec v, d[N];

  Dual() = default;
  TORCHLIN_INLINE Dual(Vec constant) : v(constant), d{} {}
  // One that depends on fewer.
  template <unsigned Other, class = std::enable_if_t<Other != Mask && (Other & ~Mask) == 0>>
  TORCHLIN_INLINE Dual(Dual<Vec, N, Other> u) : v(u.v) {
    for (int i = 0; i < N; ++i) d[i] = Other >> i & 1 ? u.d[i] : Vec{};
  }
  // The variable `which`.
  TORCHLIN_INLINE static Dual variable(Vec value, int which = 0) {
    Dual u(value);
    u.d[which] = lit<Vec>(1.0);
    return u;
  }
};

template <class Vec, int N, unsigned M>
struct constant_of<Dual<Vec, N, M>> {
  using type = Vec;
};

template <class T>
inline constexpr bool is_dual = false;
template <class Vec, int N, unsigned M>
inline constexpr bool is_dual<Dual<Vec, N, M>> = true;

template <class T>
TORCHLIN_INLINE constant<T> value(T u) {
  if constexpr (is_dual<T>) return u.v;
  else return u;
}
// What a mixture of both is: the dual number if there is one, and if both are, one that depends on what either does.
template <class A, class B>
struct common_of {
  using type = std::conditional_t<is_dual<A>, A, B>;
};
template <class Vec, int N, unsigned A, unsigned B>
struct common_of<Dual<Vec, N, A>, Dual<Vec, N, B>> {
  using type = Dual<Vec, N, A | B>;
};
template <class A, class B>
using common = typename common_of<A, B>::type;

template <class T>
TORCHLIN_INLINE constexpr bool depends_on([[maybe_unused]] int i) {
  if constexpr (is_dual<T>) return T::mask >> i & 1;
  else return false;
}

// The value v with derivatives f(i).
template <class T, class Vec, class Function>
TORCHLIN_INLINE T with_derivatives(Vec v, Function f) {
  T out;
  out.v = v;
  for (int i = 0; i < T::variables; ++i) {
    if (T::mask >> i & 1) out.d[i] = f(i);
  }
  return out;
}

// The value v with derivatives by the chain rule; of constants there are none.
template <class A, class B, class Vec>
TORCHLIN_INLINE auto chain(Vec v, A a, Vec by_a, B b, Vec by_b) {
  if constexpr (!is_dual<A> && !is_dual<B>) {
    return v;
  } else {
    return with_derivatives<common<A, B>>(v, [&](int i) {
      if constexpr (!is_dual<A>) return by_b * b.d[i];
      else if constexpr (!is_dual<B>) return by_a * a.d[i];
      else if (depends_on<A>(i) && depends_on<B>(i)) return by_a * a.d[i] + by_b * b.d[i];
      else return depends_on<A>(i) ? by_a * a.d[i] : by_b * b.d[i];
    });
  }
}

// A binary operator is found with a dual number on either side.
#define TORCHLIN_DUAL_BINARY(op)                                                                                            \
  template <class Vec, int N, unsigned A, unsigned B>                                                                       \
  TORCHLIN_INLINE Dual<Vec, N, A | B> operator op(Dual<Vec, N, A> a, Dual<Vec, N, B> b)
#define TORCHLIN_DUAL_LEFT(op)                                                                                              \
  template <class Vec, int N, unsigned A>                                                                                   \
  TORCHLIN_INLINE Dual<Vec, N, A> operator op(Dual<Vec, N, A> a, typename Dual<Vec, N, A>::value_type b)
#define TORCHLIN_DUAL_RIGHT(op)                                                                                             \
  template <class Vec, int N, unsigned A>                                                                                   \
  TORCHLIN_INLINE Dual<Vec, N, A> operator op(typename Dual<Vec, N, A>::value_type a, Dual<Vec, N, A> b)
#define TORCHLIN_DERIVATIVES(value, expression) \
  return with_derivatives<Dual<Vec, N, A>>(value, [&](int i) { return expression; })
// By variables that both depend on, that a does, that b does.
#define TORCHLIN_DERIVATIVES_OF_TWO(value, both, by_a, by_b)                     \
  return with_derivatives<Dual<Vec, N, A | B>>(value, [&](int i) {               \
    return (A & B) >> i & 1 ? both : A >> i & 1 ? by_a : by_b;                   \
  })

TORCHLIN_DUAL_BINARY(+) { TORCHLIN_DERIVATIVES_OF_TWO(a.v + b.v, a.d[i] + b.d[i], a.d[i], b.d[i]); }
TORCHLIN_DUAL_LEFT(+) { TORCHLIN_DERIVATIVES(a.v + b, a.d[i]); }
TORCHLIN_DUAL_RIGHT(+) { TORCHLIN_DERIVATIVES(a + b.v, b.d[i]); }
TORCHLIN_DUAL_BINARY(-) { TORCHLIN_DERIVATIVES_OF_TWO(a.v - b.v, a.d[i] - b.d[i], a.d[i], -b.d[i]); }
TORCHLIN_DUAL_LEFT(-) { TORCHLIN_DERIVATIVES(a.v - b, a.d[i]); }
TORCHLIN_DUAL_RIGHT(-) { TORCHLIN_DERIVATIVES(a - b.v, -b.d[i]); }
TORCHLIN_DUAL_BINARY(*) {
  TORCHLIN_DERIVATIVES_OF_TWO(a.v * b.v, a.d[i] * b.v + a.v * b.d[i], a.d[i] * b.v, a.v * b.d[i]);
}
TORCHLIN_DUAL_LEFT(*) { TORCHLIN_DERIVATIVES(a.v * b, a.d[i] * b); }
TORCHLIN_DUAL_RIGHT(*) { TORCHLIN_DERIVATIVES(a * b.v, a * b.d[i]); }
TORCHLIN_DUAL_BINARY(/) {
  const Vec q = a.v / b.v, slope = -q / b.v;
  TORCHLIN_DERIVATIVES_OF_TWO(q, (a.d[i] - q * b.d[i]) / b.v, a.d[i] / b.v, slope * b.d[i]);
}
TORCHLIN_DUAL_LEFT(/) { TORCHLIN_DERIVATIVES(a.v / b, a.d[i] / b); }
TORCHLIN_DUAL_RIGHT(/) {
  const Vec q = a / b.v, slope = -q / b.v;
  TORCHLIN_DERIVATIVES(q, slope * b.d[i]);
}
template <class Vec, int N, unsigned A>
TORCHLIN_INLINE Dual<Vec, N, A> operator-(Dual<Vec, N, A> a) {
  TORCHLIN_DERIVATIVES(-a.v, -a.d[i]);
}

#define TORCHLIN_DUAL_UNARY(name)                             \
  template <class Vec, int N, unsigned A>                     \
  TORCHLIN_INLINE Dual<Vec, N, A> name(Dual<Vec, N, A> a) {   \
    const Pair<Vec> f = name##_pair(a.v);                     \
    TORCHLIN_DERIVATIVES(f.v, f.d * a.d[i]);                  \
  }
TORCHLIN_UNARY_NAMES(TORCHLIN_DUAL_UNARY)
#undef TORCHLIN_DUAL_UNARY

template <class Vec, int N, unsigned A>
TORCHLIN_INLINE Dual<Vec, N, A> abs(Dual<Vec, N, A> a) {
  const Vec slope = sign(a.v);
  TORCHLIN_DERIVATIVES(abs(a.v), slope * a.d[i]);
}
template <class Vec, int N, unsigned A>
TORCHLIN_INLINE Vec sign(Dual<Vec, N, A> a) {
  return sign(a.v);
}

#undef TORCHLIN_DUAL_BINARY
#undef TORCHLIN_DUAL_LEFT
#undef TORCHLIN_DUAL_RIGHT
#undef TORCHLIN_DERIVATIVES
#undef TORCHLIN_DERIVATIVES_OF_TWO

// ---- comparison and selection, of plain vectors too ----

#define TORCHLIN_COMPARE(name, op)             \
  template <class A, class B>                  \
  TORCHLIN_INLINE auto name(A a, B b) {        \
    return value(a) op value(b);               \
  }
TORCHLIN_COMPARE(gt, >)
TORCHLIN_COMPARE(ge, >=)
TORCHLIN_COMPARE(lt, <)
TORCHLIN_COMPARE(le, <=)
TORCHLIN_COMPARE(eq, ==)
TORCHLIN_COMPARE(ne, !=)
#undef TORCHLIN_COMPARE

template <class Mask, class A, class B>
TORCHLIN_INLINE auto where(Mask m, A a, B b) {
  if constexpr (!is_dual<A> && !is_dual<B>) {
    return m ? a : b;
  } else {
    using Vec = constant<common<A, B>>;
    return with_derivatives<common<A, B>>(m ? value(a) : value(b), [&](int i) {
      if constexpr (!is_dual<A>) return m ? Vec{} : b.d[i];
      else if constexpr (!is_dual<B>) return m ? a.d[i] : Vec{};
      else if (depends_on<A>(i) && depends_on<B>(i)) return m ? a.d[i] : b.d[i];
      else return depends_on<A>(i) ? (m ? a.d[i] : Vec{}) : (m ? Vec{} : b.d[i]);
    });
  }
}

// NaN if either is; a at a tie, and its derivative: the subgradient of relu = max(0, x) at 0 is 0.
template <class A, class B>
TORCHLIN_INLINE auto max(A a, B b) {
  const auto u = value(a), v = value(b);
  if constexpr (!is_dual<A> && !is_dual<B>) return u != u ? u : most(u, v);
  else return where((v <= u) | (u != u), a, b);
}
template <class A, class B>
TORCHLIN_INLINE auto min(A a, B b) {
  const auto u = value(a), v = value(b);
  if constexpr (!is_dual<A> && !is_dual<B>) return u != u ? u : least(u, v);
  else return where((v >= u) | (u != u), a, b);
}
template <class A, class Low, class High>
TORCHLIN_INLINE auto clamp(A u, Low low, High high) {
  return min(high, max(low, u));
}

// Straight through: the value of one with the derivative of the other.
template <class A, class B>
TORCHLIN_INLINE auto ste(A a, B b) {
  if constexpr (!is_dual<B>) return value(a);
  else return with_derivatives<B>(value(a), [&](int i) { return b.d[i]; });
}

// ---- two arguments ----

template <class A, class B>
TORCHLIN_INLINE auto hypot(A a, B b) -> std::enable_if_t<is_dual<A> || is_dual<B>, common<A, B>> {
  const auto u = value(a), v = value(b), h = hypot(u, v);
  return chain(h, a, u / h, b, v / h);
}
template <class A, class B>
TORCHLIN_INLINE auto pow(A a, B b) -> std::enable_if_t<is_dual<A> || is_dual<B>, common<A, B>> {
  const auto u = value(a), v = value(b), power = pow(u, v);
  const auto by_base = pow_by_base(u, v, power), by_exponent = pow_by_exponent(u, v, power);
  if constexpr (is_dual<A> && is_dual<B>) {
    // The logarithm of a negative base is NaN: that is the exponent's derivative alone.
    using Vec = constant<A>;
    return with_derivatives<common<A, B>>(power, [&](int i) {
      if (!depends_on<B>(i)) return by_base * a.d[i];
      const Vec of_exponent = b.d[i] == Vec{} ? Vec{} : by_exponent * b.d[i];
      return depends_on<A>(i) ? by_base * a.d[i] + of_exponent : of_exponent;
    });
  } else {
    return chain(power, a, by_base, b, by_exponent);
  }
}

}  // namespace tl
