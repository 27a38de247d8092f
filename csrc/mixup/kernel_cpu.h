// Sums of two samples, over vectors of neighbours. Products are rounded before they are added: every level computes the same bits.

namespace {  // other families have a kKernels, too

using mixup::Cut;
using mixup::Mix;

template <class Vec>
TORCHLIN_INLINE Vec times(Vec a, Vec b) {
  Vec p = a * b;
  opaque(p);
  return p;
}

// f(i, count, whole) over vectors of n neighbours.
template <class C, class F>
TORCHLIN_INLINE void for_each_vector(int64_t n, const F& f) {
  constexpr int W = kLanes<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, int64_t{W}, std::true_type{});
  if (i < n) f(i, n - i, std::false_type{});
}
template <bool Whole, class T>
TORCHLIN_INLINE V<compute_of<T>> get(const T* p, int64_t n) {
  if constexpr (Whole) return load(p);
  else return load_n(p, n);
}
template <bool Whole, class T>
TORCHLIN_INLINE void put(T* p, V<compute_of<T>> v, int64_t n) {
  if constexpr (Whole) store(p, v);
  else store_n(p, v, n);
}

template <class T>
void forward(const Mix& mix, int64_t o, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using C = compute_of<T>;
  const T* const x = static_cast<const T*>(mix.x) + begin;
  for (int64_t s = first; s < last; ++s) {
    const V<C> lam = splat(static_cast<const C*>(mix.lam)[s * mix.lam_step]);
    const V<C> rest = splat(static_cast<const C*>(mix.rest)[s * mix.lam_step]);
    const T *const own = x + mix.row(o, s), *const other = x + mix.row(o, mix.partner[s]);
    T* const out = static_cast<T*>(mix.out) + begin + mix.row(o, s);
    for_each_vector<C>(end - begin, [&](int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
      put<whole>(out + i, times(lam, get<whole>(own + i, n)) + times(rest, get<whole>(other + i, n)), n);
    });
  }
}

template <class T>
void backward(const Mix& mix, int64_t o, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using C = compute_of<T>;
  const T* const grad = static_cast<const T*>(mix.x) + begin;
  const C *const lam = static_cast<const C*>(mix.lam), *const rest = static_cast<const C*>(mix.rest);
  for (int64_t s = first; s < last; ++s) {
    const V<C> own_weight = splat(lam[s * mix.lam_step]);
    const T* const own = grad + mix.row(o, s);
    T* const dx = static_cast<T*>(mix.out) + begin + mix.row(o, s);
    for_each_vector<C>(end - begin, [&](int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
      V<C> sum = times(own_weight, get<whole>(own + i, n));
      for (int64_t k = mix.head[s]; k >= 0; k = mix.next[k]) {
        sum += times(splat(rest[k * mix.lam_step]), get<whole>(grad + mix.row(o, k) + i, n));
      }
      put<whole>(dx + i, sum, n);
    });
  }
}

template <class T>
void lam_backward(const Mix& mix, int64_t o, int64_t begin, int64_t end, double* sums) {
  using C = compute_of<T>;
  const T *const grad = static_cast<const T*>(mix.x) + begin, *const x = static_cast<const T*>(mix.other) + begin;
  for (int64_t s = 0; s < mix.batch; ++s) {
    const T *const g = grad + mix.row(o, s), *const own = x + mix.row(o, s), *const other = x + mix.row(o, mix.partner[s]);
    double total = 0;
    constexpr int64_t kBlock = 16 * kLanes<C>;  // what is summed in the compute type: few additions to a lane
    for (int64_t at = 0; at < end - begin; at += kBlock) {
      V<C> sum{};
      for_each_vector<C>(std::min(kBlock, end - begin - at), [&](int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
        i += at;
        sum += get<whole>(g + i, n) * (get<whole>(own + i, n) - get<whole>(other + i, n));
      });
      // Halves that fold onto each other: log2(lanes) additions.
      alignas(64) C lanes[kLanes<C>];
      store(lanes, sum);
      for (int half = kLanes<C> / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
      }
      total += lanes[0];
    }
    sums[s] += total;
  }
}

// dx of a plane: the gradient outside of the sample's own box, and that inside of the boxes that were cut from it.
template <class T>
void cut_backward(const Cut& cut, int64_t sample, int64_t plane, void* room) {
  using C = compute_of<T>;
  C* const sum = static_cast<C*>(room);
  const int64_t row = cut.row(), at = plane * cut.plane();
  const T* const grad = static_cast<const T*>(cut.x) + at;
  T* const dx = static_cast<T*>(cut.out) + at + sample * cut.sample();
  const auto add = [&](const int64_t* box, int64_t h, const T* from, auto f) __attribute__((always_inline)) {
    if (h < box[0] || h >= box[1]) return;
    const int64_t begin = box[2] * cut.depth, n = box[3] * cut.depth - begin;
    for_each_vector<C>(n, [&](int64_t i, int64_t count, auto whole) __attribute__((always_inline)) {
      C* const to = sum + begin + i;
      put<whole>(to, f(get<whole>(to, count), get<whole>(from + begin + i, count)), count);
    });
  };
  for (int64_t h = 0; h < cut.height; ++h) {
    for (int64_t q = 0; q < cut.between; ++q) {
      const int64_t offset = (h * cut.between + q) * row;
      const T* const own = grad + sample * cut.sample() + offset;
      for_each_vector<C>(row, [&](int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
        put<whole>(sum + i, get<whole>(own + i, n), n);
      });
      add(cut.boxes + sample * cut.box_step, h, own, [](V<C>, V<C>) __attribute__((always_inline)) { return V<C>{}; });
      for (int64_t k = cut.head[sample]; k >= 0; k = cut.next[k]) {
        add(cut.boxes + k * cut.box_step, h, grad + k * cut.sample() + offset,
            [](V<C> a, V<C> b) __attribute__((always_inline)) { return a + b; });
      }
      for_each_vector<C>(row, [&](int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
        put<whole>(dx + offset + i, get<whole>(sum + i, n), n);
      });
    }
  }
}

template <class T>
constexpr mixup::Kernel kernel_of() {
  return {&forward<T>, &backward<T>, &lam_backward<T>, &cut_backward<T>};
}
inline constexpr mixup::Kernel kKernels[] = {kernel_of<float>(), kernel_of<double>(), kernel_of<f16>(), kernel_of<bf16>()};

}  // namespace
