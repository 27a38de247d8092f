// Loops over vectors for the functors of one shard, TORCHLIN_SHARD_FILE, at the level being compiled (simd/foreach_isa.h).
#include "simd/math.h"
#include "simd/dual.h"

#undef TORCHLIN_FUNCTOR
#define TORCHLIN_FUNCTOR TORCHLIN_INLINE
namespace tl {
#include "activation/reductions.h"
}
#include TORCHLIN_SHARD_FILE

using torchlin::activation::Args;

// Slots as constants.
template <class C, class K>
struct Slots {
  const C* base[K::slots > 0 ? K::slots : 1];
  int64_t ld, step, lengths[K::slots > 0 ? K::slots : 1], at = 0;

  TORCHLIN_INLINE explicit Slots(const Args& a) : ld(a.slots_ld), step(a.slots_step) {
    for (int i = 0; i < K::slots; ++i) {
      base[i] = static_cast<const C*>(a.slots) + a.first_row[i] * ld;
      lengths[i] = a.lengths[i];
    }
  }
  TORCHLIN_INLINE V<C> value(int i, int j) const {
    return load(base[i] + at + (K::vectors >> i & 1 ? j * ld : 0));
  }
  template <class T>
  TORCHLIN_INLINE V<C> arg(int i, int j) const {
    return value(i, j);
  }
  TORCHLIN_INLINE int length(int i) const { return static_cast<int>(lengths[i]); }
  TORCHLIN_INLINE void advance() { at += step * kLanes<C>; }
};

// Sums of gradients, in memory: rows as Slots has them.
template <class C, class K>
struct SlotGrads {
  C* base[K::slots > 0 ? K::slots : 1];
  int64_t ld, step, at = 0;

  TORCHLIN_INLINE explicit SlotGrads(const Args& a) : ld(a.slot_grads_ld), step(a.slot_grads_step) {
    for (int i = 0; i < K::slots; ++i) base[i] = static_cast<C*>(a.slot_grads) + a.first_row[i] * ld;
  }
  TORCHLIN_INLINE void add(int i, int j, V<C> g) const {
    C* sum = base[i] + at + (K::vectors >> i & 1 ? j * ld : 0);
    store(sum, load(sum) + g);
  }
  TORCHLIN_INLINE void advance() { at += step * kLanes<C>; }
};

// Variables of the run that gives derivatives: inputs, slots of one value, reductions.
template <class K>
constexpr int variable_of_slot(int i) {
  int at = K::inputs;
  for (int k = 0; k < i; ++k) at += !(K::vectors >> k & 1);
  return at;
}

template <class C, class K>
struct VariableSlots : Slots<C, K> {
  static constexpr int variables = variable_of_slot<K>(K::slots) + K::reductions;
  using Dual = tl::Dual<V<C>, variables>;
  TORCHLIN_INLINE explicit VariableSlots(const Args& a) : Slots<C, K>(a) {}

  template <class T>
  TORCHLIN_INLINE auto arg(int i, int j) const {
    const V<C> v = this->value(i, j);
    return K::vectors >> i & 1 ? Dual(v) : Dual::variable(v, variable_of_slot<K>(i));
  }
  template <int k>
  TORCHLIN_INLINE Dual mark(Dual total) const {
    total.d[variables - K::reductions + k] += tl::lit<V<C>>(1.0);
    return total;
  }
};

template <class C, class K>
struct CollectingSlots : Slots<C, K> {
  using Dual = tl::Dual<V<C>, K::slots>;
  SlotGrads<C, K> grads;
  V<C> weight[K::reductions > 0 ? K::reductions : 1];  // d loss/d R_k

  TORCHLIN_INLINE explicit CollectingSlots(const Args& a) : Slots<C, K>(a), grads(a) {}

  template <class T>
  TORCHLIN_INLINE Dual element(int i, int j) const {
    return Dual::variable(this->value(i, j), i);
  }
  template <int k, int... slots, class Term>
  TORCHLIN_INLINE V<C> collect(Term term, int j) const {
    (grads.add(slots, j, weight[k] * term.d[slots]), ...);
    return term.v;
  }
  template <int k, int i>
  TORCHLIN_INLINE void collect_basis(V<C> b, int j) const {
    grads.add(i, j, weight[k] * b);
  }
};

namespace tl {
template <class C, class K>
inline constexpr Reductions reductions_of<VariableSlots<C, K>> = Reductions::mark;
template <class C, class K>
inline constexpr Reductions reductions_of<CollectingSlots<C, K>> = Reductions::collect;
}  // namespace tl

// f of element i's vector; T says whether with derivatives.
template <class T, class K, class S, class P>
TORCHLIN_INLINE T apply(const S* const* x, int64_t i, const P& p) {
  const auto input = [&](int k) {
    if constexpr (tl::is_dual<T>) return T::variable(load(x[k] + i), k);
    else return load(x[k] + i);
  };
  if constexpr (K::inputs == 1) return K::template f<T>(input(0), p);
  else if constexpr (K::inputs == 2) return K::template f<T>(input(0), input(1), p);
  else return K::template f<T>(input(0), input(1), input(2), p);
}

template <class S, class K>
struct Inputs {
  const S* x[K::inputs];
  explicit Inputs(const Args& a) {
    for (int k = 0; k < K::inputs; ++k) x[k] = static_cast<const S*>(a.inputs[k]);
  }
};

template <class S, class K>
void forward(const Args& a) {
  using C = compute_of<S>;
  const Inputs<S, K> in(a);
  Slots<C, K> p(a);
  S* out = static_cast<S*>(a.outputs[0]);
  const int64_t n = a.n;
  for (int64_t i = 0; i < n; i += kLanes<C>, p.advance()) store(out + i, apply<V<C>, K>(in.x, i, p));
}

template <class S, class K>
void backward(const Args& a) {
  using C = compute_of<S>;
  using Dual = tl::Dual<V<C>, K::inputs>;
  const Inputs<S, K> in(a);
  Slots<C, K> p(a);
  const S* grad = static_cast<const S*>(a.grad);
  S* out[K::inputs];
  for (int k = 0; k < K::inputs; ++k) out[k] = static_cast<S*>(a.outputs[k]);
  const int64_t n = a.n;
  for (int64_t i = 0; i < n; i += kLanes<C>, p.advance()) {
    const Dual y = apply<Dual, K>(in.x, i, p);
    const V<C> g = load(grad + i);
    for (int k = 0; k < K::inputs; ++k) {
      if (K::inputs == 1 || out[k] != nullptr) store(out[k] + i, g * y.d[k]);
    }
  }
}

template <class C, class K>
void backward_slots(const Args& a) {
  using P = VariableSlots<C, K>;
  const Inputs<C, K> in(a);
  P p(a);
  SlotGrads<C, K> grads(a);
  CollectingSlots<C, K> q(a);
  const C* grad = static_cast<const C*>(a.grad);
  C* out[K::inputs];
  for (int k = 0; k < K::inputs; ++k) out[k] = static_cast<C*>(a.outputs[k]);
  const int64_t n = a.n;
  for (int64_t i = 0; i < n; i += kLanes<C>) {
    const auto y = apply<typename P::Dual, K>(in.x, i, p);
    const V<C> g = load(grad + i);
    if constexpr (K::reductions > 0) {
      for (int k = 0; k < K::reductions; ++k) q.weight[k] = g * y.d[P::variables - K::reductions + k];
      apply<V<C>, K>(in.x, i, q);
    }
    unroll<K::slots>([&](int s) {
      if (!(K::vectors >> s & 1)) grads.add(s, 0, g * y.d[variable_of_slot<K>(s)]);
    });
    for (int k = 0; k < K::inputs; ++k) {
      if (out[k] != nullptr) store(out[k] + i, g * y.d[k]);
    }
    p.advance();
    q.advance();
    q.grads.advance();
    grads.advance();
  }
}

// Double is for gradient checks: libm lane by lane is no faster at other levels.
template <class S>
inline constexpr bool kCompiled = sizeof(S) == 4 || TORCHLIN_ISA_BYTES == 16;

template <class S, class K>
constexpr activation::Kernel forward_kernel() {
  if constexpr (kCompiled<S>) return forward<S, K>;
  else return nullptr;
}
template <class S, class K>
constexpr activation::Kernel backward_kernel() {
  if constexpr (kCompiled<S>) return backward<S, K>;
  else return nullptr;
}
template <class C, class K>
constexpr activation::Kernel slots_kernel() {
  if constexpr (kCompiled<C> && K::slots > 0) return backward_slots<C, K>;
  else return nullptr;
}

#define TORCHLIN_FUNCTIONS(K)                                                    \
  {{forward_kernel<float, K>(), forward_kernel<double, K>(), nullptr, nullptr},  \
   {backward_kernel<float, K>(), backward_kernel<double, K>(), nullptr, nullptr}, \
   {slots_kernel<float, K>(), slots_kernel<double, K>(), nullptr, nullptr}},
#define TORCHLIN_FUNCTOR_ROW(K) {K::id, K::inputs, K::slots, K::vectors},
const activation::Functions kFunctions[] = {TORCHLIN_SHARD(TORCHLIN_FUNCTIONS)};
const activation::Functor kFunctors[] = {TORCHLIN_SHARD(TORCHLIN_FUNCTOR_ROW)};
#undef TORCHLIN_FUNCTIONS
#undef TORCHLIN_FUNCTOR_ROW
#undef TORCHLIN_SHARD
