// Sums over coefficient vectors, for generated functors (torchlin/catalogue/cpp_code.py). Included in namespace tl of whoever
// provides arithmetic, lit, arg and length, hence no include guard; TORCHLIN_FUNCTOR says how functions are declared.
//
// Derivatives by coefficients do not take a variable each. Let R_k be the reductions of a functor, in order, and c_j their
// coefficients. Then d out/d c_j = (d out/d R_k) (d R_k/d c_j), and two runs give all of them: the first, P `marks`, in which
// each R_k is made a variable of the dual numbers it is computed in; the second, P `collects`, in plain numbers, in which the
// terms' own derivatives are handed out, one j after the other.

// A loop over coefficients is as long as it is: unrolled for a GPU it would cost registers and code.
#ifndef TORCHLIN_NO_UNROLL
#define TORCHLIN_NO_UNROLL
#endif

enum class Reductions { plain, mark, collect };
template <class P>
inline constexpr Reductions reductions_of = Reductions::plain;
template <class P>
inline constexpr bool typed_slots = false;

// A slot, and a coefficient within a sum. A P with typed_slots gives each a type of its own, which depends on that slot only:
// p.slot<i>(), p.element<i>(j). Without, p.element<T>(i, j) is the coefficient as a variable in the second run.
template <class T, int i, class P>
TORCHLIN_FUNCTOR auto slot(const P& p) {
  if constexpr (typed_slots<P>) return p.template slot<i>();
  else return arg<T>(p, i);
}
template <class T, int i, class P>
TORCHLIN_FUNCTOR auto element(const P& p, int j) {
  if constexpr (typed_slots<P>) return p.template element<i>(j);
  else if constexpr (reductions_of<P> == Reductions::collect) return p.template element<T>(i, j);
  else return arg<T>(p, i, j);
}

// p.mark<k>(total): the total as a variable.
template <int k, class P, class Total>
TORCHLIN_FUNCTOR auto reduced(const P& p, const Total& total) {
  if constexpr (reductions_of<P> == Reductions::mark) return p.template mark<k>(total);
  else return total;
}

// p.collect<k, slots...>(term, j): takes the derivatives of a term, a dual number in the vector slots; returns its value.
template <int k, class T, int first, int... others, class P, class Term>
TORCHLIN_FUNCTOR auto sum(const P& p, const Term& term) {
  const int n = length(p, first);
  const auto at = [&](int j) {
    if constexpr (reductions_of<P> == Reductions::collect) return p.template collect<k, first, others...>(term(j), j);
    else return term(j);
  };
  decltype(lit<T>(0.0) + at(0)) total = lit<T>(0.0);
  TORCHLIN_NO_UNROLL
  for (int j = 0; j < n; ++j) total = total + at(j);
  return reduced<k>(p, total);
}

// p.collect_basis<k, i>(b, j): b = d R_k/d c_j.
template <int k, class T, int i, class P, class U>
TORCHLIN_FUNCTOR auto polynomial(const P& p, U u) {
  const int n = length(p, i);
  if constexpr (reductions_of<P> == Reductions::collect) {
    U power = lit<T>(1.0);
    TORCHLIN_NO_UNROLL
    for (int j = 0; j < n; ++j, power = power * u) p.template collect_basis<k, i>(power, j);
  }
  decltype(u * arg<T>(p, i, 0)) total = arg<T>(p, i, n - 1);
  TORCHLIN_NO_UNROLL
  for (int j = n - 1; j-- > 0;) total = total * u + arg<T>(p, i, j);
  return reduced<k>(p, total);
}

// b_0 = 1, b_{j+1} = alpha(j) u b_j - gamma(j) b_{j-1}
template <int k, class T, int i, class P, class U, class Alpha, class Gamma>
TORCHLIN_FUNCTOR auto recurrence(const P& p, U u, Alpha alpha, Gamma gamma) {
  const int n = length(p, i);
  U now = lit<T>(1.0), last = lit<T>(0.0);
  decltype(u * arg<T>(p, i, 0)) total = arg<T>(p, i, 0);
  TORCHLIN_NO_UNROLL
  for (int j = 0;; ++j) {
    if constexpr (reductions_of<P> == Reductions::collect) p.template collect_basis<k, i>(now, j);
    if (j + 1 >= n) break;
    const U next = lit<T>(alpha(j)) * u * now - lit<T>(gamma(j)) * last;
    last = now;
    now = next;
    total = total + now * arg<T>(p, i, j + 1);
  }
  return reduced<k>(p, total);
}
template <int k, class T, int i, class P, class U>
TORCHLIN_FUNCTOR auto chebyshev(const P& p, U u) {
  return recurrence<k, T, i>(p, u, [](int j) { return j ? 2.0 : 1.0; }, [](int j) { return j ? 1.0 : 0.0; });
}
template <int k, class T, int i, class P, class U>
TORCHLIN_FUNCTOR auto legendre(const P& p, U u) {
  return recurrence<k, T, i>(p, u, [](int j) { return (2.0 * j + 1.0) / (j + 1.0); }, [](int j) { return j / (j + 1.0); });
}
template <int k, class T, int i, class P, class U>
TORCHLIN_FUNCTOR auto hermite(const P& p, U u) {
  return recurrence<k, T, i>(p, u, [](int) { return 2.0; }, [](int j) { return 2.0 * j; });
}
