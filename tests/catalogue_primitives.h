// The names that generated functors compute with (torchlin/catalogue/cpp_code.py lists them), for double and for dual numbers over
// double, written for clearness. Tests compare what the functors give with these against the torch reference.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

struct Dual {
  double v = 0.0, d = 0.0;
  Dual() = default;
  Dual(double v, double d = 0.0) : v(v), d(d) {}  // a constant converts
};

inline double value(double u) { return u; }
inline double value(Dual u) { return u.v; }

inline Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
inline Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
inline Dual operator-(Dual a) { return {-a.v, -a.d}; }
inline Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
inline Dual operator*(double a, Dual b) { return {a * b.v, a * b.d}; }
inline Dual operator*(Dual a, double b) { return {a.v * b, a.d * b}; }
inline Dual operator/(Dual a, Dual b) {
  const double q = a.v / b.v;
  return {q, (a.d - q * b.d) / b.v};
}

// Slots of one call: values[offset[i] .. + size[i]) belong to slot i.
struct Slots {
  const double* values;
  const int* offset;
  const int* size;
};

// The same where derivatives by one of the values are wanted.
struct SeededSlots : Slots {
  int seed;
};

namespace tl {

template <class T>
double lit(double c) {
  return c;
}
template <class T>
double arg(const Slots& p, int i, int j = 0) {
  return p.values[p.offset[i] + j];
}
template <class T>
Dual arg(const SeededSlots& p, int i, int j = 0) {
  const int at = p.offset[i] + j;
  return {p.values[at], at == p.seed ? 1.0 : 0.0};
}
inline int length(const Slots& p, int i) { return p.size[i]; }

#define TORCHLIN_FUNCTOR inline
#include "activation/reductions.h"

template <class A, class B>
using Common = std::conditional_t<std::is_same_v<A, B>, A, Dual>;

template <class A, class B>
bool gt(A a, B b) {
  return value(a) > value(b);
}
template <class A, class B>
bool ge(A a, B b) {
  return value(a) >= value(b);
}
template <class A, class B>
bool lt(A a, B b) {
  return value(a) < value(b);
}
template <class A, class B>
bool le(A a, B b) {
  return value(a) <= value(b);
}
template <class A, class B>
bool eq(A a, B b) {
  return value(a) == value(b);
}
template <class A, class B>
bool ne(A a, B b) {
  return value(a) != value(b);
}
template <class A, class B>
Common<A, B> where(bool m, A a, B b) {
  return m ? Common<A, B>(a) : Common<A, B>(b);
}
template <class A, class B>
Common<A, B> max(A a, B b) {
  return where(value(b) <= value(a) || value(a) != value(a), a, b);
}
template <class A, class B>
Common<A, B> min(A a, B b) {
  return where(value(b) >= value(a) || value(a) != value(a), a, b);
}
template <class A, class B, class C>
auto clamp(A u, B lo, C hi) {
  return min(hi, max(lo, u));
}

inline double sign(double u) { return (u > 0) - (u < 0); }
inline double sigmoid(double u) {
  const double e = std::exp(-std::fabs(u));
  return (u >= 0 ? 1.0 : e) / (1.0 + e);
}
inline double softplus(double u) { return (u > 0 ? u : 0.0) + std::log1p(std::exp(-std::fabs(u))); }
inline double sech(double u) {
  const double e = std::exp(-std::fabs(u));
  return 2.0 * e / (1.0 + e * e);
}
inline double sinc(double u) { return u == 0 ? 1.0 : std::sin(u) / u; }
inline double tanh_softplus(double u) {
  const double e = std::exp(u > 40 ? 40.0 : u), n = e * (e + 2.0);
  return n / (n + 2.0);
}
inline double log1p_sigmoid(double u) { return std::log1p(sigmoid(u)); }
inline double ste(double u, double) { return u; }
inline Dual ste(Dual u, Dual v) { return {u.v, v.d}; }
inline Dual sign(Dual u) { return {sign(u.v), 0.0}; }
inline Dual abs(Dual u) { return {std::fabs(u.v), sign(u.v) * u.d}; }
inline double abs(double u) { return std::fabs(u); }

// A function of one argument and its derivative as an expression in u (the argument) and f (the value).
#define TL_UNARY(name, function, derivative)                 \
  inline double name##_value(double u) { return function; }  \
  inline Dual name(Dual x) {                                 \
    const double u = x.v, f = name##_value(u);               \
    (void)f;                                                 \
    return {f, (derivative) * x.d};                          \
  }
#define TL_MATH(name, derivative)                     \
  inline double name(double u) { return std::name(u); } \
  TL_UNARY(name, std::name(u), derivative)

TL_MATH(sqrt, 0.5 / f)
TL_MATH(exp, f)
TL_MATH(expm1, std::exp(u))
TL_MATH(log, 1.0 / u)
TL_MATH(log1p, 1.0 / (1.0 + u))
TL_MATH(tanh, sech(u) * sech(u))
TL_MATH(erf, M_2_SQRTPI * std::exp(-u * u))
TL_MATH(erfc, -M_2_SQRTPI * std::exp(-u * u))
inline double ndtr(double u) { return 0.5 * std::erfc(-M_SQRT1_2 * u); }
TL_UNARY(ndtr, ndtr(u), 0.5 * M_SQRT1_2 * M_2_SQRTPI * std::exp(-0.5 * u * u))
TL_MATH(sin, std::cos(u))
TL_MATH(cos, -std::sin(u))
TL_MATH(atan, 1.0 / (1.0 + u * u))
TL_MATH(sinh, std::cosh(u))
TL_MATH(cosh, std::sinh(u))
TL_MATH(asinh, 1.0 / std::hypot(1.0, u))
TL_UNARY(sigmoid, sigmoid(u), f * sigmoid(-u))
TL_UNARY(softplus, softplus(u), sigmoid(u))
TL_UNARY(sech, sech(u), -f * std::tanh(u))
TL_UNARY(sinc, sinc(u), std::fabs(u) < 1e-4 ? -u / 3.0 : (std::cos(u) - f) / u)
TL_UNARY(tanh_softplus, tanh_softplus(u), (1.0 - f) * (1.0 + f) * sigmoid(u))
TL_UNARY(log1p_sigmoid, log1p_sigmoid(u), sigmoid(u) * sigmoid(-u) / (1.0 + sigmoid(u)))

inline double hypot(double k, double u) { return std::hypot(k, u); }
inline Dual hypot(Dual k, Dual u) {
  const double h = std::hypot(k.v, u.v);
  return {h, k.v / h * k.d + u.v / h * u.d};
}
inline double pow(double u, double v) { return std::pow(u, v); }
inline Dual pow(Dual u, Dual v) {
  const double f = std::pow(u.v, v.v);
  const double du = v.v == 0 ? 0.0 : v.v * std::pow(u.v, v.v - 1.0);
  const double dv = u.v == 0 && v.v >= 0 ? 0.0 : f * std::log(u.v);
  return {f, du * u.d + (v.d == 0 ? 0.0 : dv * v.d)};
}

}  // namespace tl
