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
  template <int i>
  using Of = tl::Dual<V<C>, variables, 1u << i>;
  using Dual = tl::Dual<V<C>, variables>;

  TORCHLIN_INLINE explicit VariableSlots(const Args& a) : Slots<C, K>(a) {}

  template <int i>
  TORCHLIN_INLINE auto slot() const {
    constexpr int at = variable_of_slot<K>(i);
    return Of<at>::variable(this->value(i, 0), at);
  }
  template <int i>
  TORCHLIN_INLINE V<C> element(int j) const {
    return this->value(i, j);
  }
  template <int k, class Total>
  TORCHLIN_INLINE auto mark(Total total) const {
    constexpr int at = variables - K::reductions + k;
    tl::common<Total, Of<at>> marked(total);
    marked.d[at] = tl::lit<V<C>>(1.0);
    return marked;
  }
};

template <class C, class K>
struct CollectingSlots : Slots<C, K> {
  using Dual = tl::Dual<V<C>, K::slots>;
  SlotGrads<C, K> grads;
  V<C> weight[K::reductions > 0 ? K::reductions : 1];  // d loss/d R_k

  TORCHLIN_INLINE explicit CollectingSlots(const Args& a) : Slots<C, K>(a), grads(a) {}

  template <int i>
  TORCHLIN_INLINE V<C> slot() const {
    return this->value(i, 0);
  }
  template <int i>
  TORCHLIN_INLINE auto element(int j) const {
    return tl::Dual<V<C>, K::slots, 1u << i>::variable(this->value(i, j), i);
  }
  template <int k, int... slots>
  TORCHLIN_INLINE V<C> collect(Dual term, int j) const {
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
template <class C, class K>
inline constexpr bool typed_slots<VariableSlots<C, K>> = true;
template <class C, class K>
inline constexpr bool typed_slots<CollectingSlots<C, K>> = true;
}  // namespace tl

// Input k at element i: itself, or the variable k of dual numbers of type T.
template <class T, int k, class S>
TORCHLIN_INLINE auto input(const S* const* x, int64_t i) {
  if constexpr (tl::is_dual<T>) {
    return tl::Dual<tl::constant<T>, T::variables, 1u << k>::variable(load(x[k] + i), k);
  } else {
    return load(x[k] + i);
  }
}

// f of element i's vector; T says whether with derivatives.
template <class T, class K, class S, class P>
TORCHLIN_INLINE T apply(const S* const* x, int64_t i, const P& p) {
  if constexpr (K::inputs == 1) return K::f(input<T, 0>(x, i), p);
  else if constexpr (K::inputs == 2) return K::f(input<T, 0>(x, i), input<T, 1>(x, i), p);
  else return K::f(input<T, 0>(x, i), input<T, 1>(x, i), input<T, 2>(x, i), p);
}

// How far ahead of itself a loop asks for memory. The hardware alone does not keep the loads and stores of a long computation
// going: silu from memory takes 0.95 of a copy's time with this and 1.22 without.
constexpr int64_t kAhead = 2048;  // bytes

// Stores, past the caches if told so: that reads no line which is to be overwritten.
template <class S>
TORCHLIN_INLINE void put(S* p, V<compute_of<S>> v, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    constexpr int kBytes = kLanes<compute_of<S>> * static_cast<int>(sizeof(S));
    alignas(64) S lanes[kLanes<compute_of<S>>];
    store(lanes, v);
    if constexpr (kBytes == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(lanes));
#if TORCHLIN_ISA_BYTES >= 32
    if constexpr (kBytes == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(lanes));
#endif
#if TORCHLIN_ISA_BYTES >= 64
    if constexpr (kBytes == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(lanes));
#endif
    return;
  }
#else
  (void)stream;
#endif
  __builtin_prefetch(reinterpret_cast<char*>(p) + kAhead, 1);
  store(p, v);
}

template <class S, class K>
struct Inputs {
  const S* x[K::inputs];
  explicit Inputs(const Args& a) {
    for (int k = 0; k < K::inputs; ++k) x[k] = static_cast<const S*>(a.inputs[k]);
  }
  TORCHLIN_INLINE void fetch(int64_t i) const {
    for (int k = 0; k < K::inputs; ++k) __builtin_prefetch(reinterpret_cast<const char*>(x[k] + i) + kAhead);
  }
};

template <class S, class K>
void forward(const Args& a) {
  using C = compute_of<S>;
  const Inputs<S, K> in(a);
  Slots<C, K> p(a);
  S* out = static_cast<S*>(a.outputs[0]);
  const int64_t n = a.n;
  const bool stream = a.stream;
  for (int64_t i = 0; i < n; i += kLanes<C>, p.advance()) {
    in.fetch(i);
    put(out + i, apply<V<C>, K>(in.x, i, p), stream);
  }
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
    in.fetch(i);
    __builtin_prefetch(reinterpret_cast<const char*>(grad + i) + kAhead);
    const Dual y = apply<Dual, K>(in.x, i, p);
    const V<C> g = load(grad + i);
    for (int k = 0; k < K::inputs; ++k) {
      if (K::inputs == 1 || out[k] != nullptr) put(out[k] + i, g * y.d[k], false);
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
    in.fetch(i);
    __builtin_prefetch(reinterpret_cast<const char*>(grad + i) + kAhead);
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
      if (out[k] != nullptr) put(out[k] + i, g * y.d[k], false);
    }
    p.advance();
    q.advance();
    q.grads.advance();
    grads.advance();
  }
}

// What is compiled at this level: every function costs build time, and a missing one falls back, to the next lower level or to
// blocks of float. Double is for gradient checks, where libm lane by lane is no faster at other levels; float16, rare on CPUs,
// goes through blocks; gradients by slots are stores more than arithmetic.
template <class S>
inline constexpr bool kCompiled = std::is_same_v<S, float>    ? true
                                  : std::is_same_v<S, double> ? TORCHLIN_ISA_BYTES == 16
                                  : std::is_same_v<S, bf16>   ? TORCHLIN_ISA_BYTES > 16
                                                              : false;
template <class C>
inline constexpr bool kCompiledForSlots = kCompiled<C> && TORCHLIN_ISA_BYTES < 64;

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
  if constexpr (kCompiledForSlots<C> && K::slots > 0) return backward_slots<C, K>;
  else return nullptr;
}

#define TORCHLIN_FUNCTIONS(K)                                                    \
  {{forward_kernel<float, K>(), forward_kernel<double, K>(), forward_kernel<f16, K>(), forward_kernel<bf16, K>()},  \
   {backward_kernel<float, K>(), backward_kernel<double, K>(), backward_kernel<f16, K>(), backward_kernel<bf16, K>()}, \
   {slots_kernel<float, K>(), slots_kernel<double, K>(), nullptr, nullptr}},
#define TORCHLIN_FUNCTOR_ROW(K) {K::id, K::inputs, K::slots, K::vectors},
const activation::Functions kFunctions[] = {TORCHLIN_SHARD(TORCHLIN_FUNCTIONS)};
const activation::Functor kFunctors[] = {TORCHLIN_SHARD(TORCHLIN_FUNCTOR_ROW)};
#undef TORCHLIN_FUNCTIONS
#undef TORCHLIN_FUNCTOR_ROW
#undef TORCHLIN_SHARD
