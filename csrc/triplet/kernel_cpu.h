// The points of a triplet. One counter makes the noise of two samples, so a unit of work is a chunk of a pair: its noise is made
// in the first cache, whole vectors at a time, then added. Products are rounded before they are added to, so that every level
// computes the same bits.
namespace {  // other families have a kKernels, too

#include "triplet/philox_cpu.h"
#include "triplet/normal_cpu.h"

using triplet::Job;
using triplet::kChunk;

// Words of random bits as numbers: normal ones, or odd whole ones of -2^31 ... 2^31.
TORCHLIN_INLINE V<int64_t> signed_low(U word) { return (V<int64_t>)(word << 32) >> 32; }

template <class C>
struct Noise {
  alignas(64) C of[2][2][kChunk];  // sample of the pair; x_a, x_b
};

template <class C, bool Ball, class I>
TORCHLIN_INLINE void put_noise(Noise<C>& noise, int64_t at, const I (&words)[4]) {
  unroll<2>([&](int s) __attribute__((always_inline)) {
    V<C> a, b;
    if constexpr (Ball) normal_pair(words[2 * s], words[2 * s + 1], a, b);
    else a = __builtin_convertvector(words[2 * s] | 1, V<C>), b = __builtin_convertvector(words[2 * s + 1] | 1, V<C>);
    store(noise.of[s][0] + at, a), store(noise.of[s][1] + at, b);
  });
}

// Noise of neighbours in memory, from their places in a row-major sample: floats come from the places' even and odd lanes.
template <bool Ball>
TORCHLIN_INLINE void make_noise(Noise<float>& noise, int64_t at, U even, U odd, uint32_t pair, const triplet::Keys& keys) {
  const Counters e = philox(even, pair, keys), o = philox(odd, pair, keys);
  V<int32_t> words[4];
  unroll<4>([&](int k) __attribute__((always_inline)) { words[k] = interleave(e.w[k], o.w[k]); });
  put_noise<float, Ball>(noise, at, words);
}
template <bool Ball>
TORCHLIN_INLINE void make_noise(Noise<double>& noise, int64_t at, U first, U second, uint32_t pair, const triplet::Keys& keys) {
  constexpr int W = kLanes<double>;
  for (const U places : {first, second}) {
    const Counters c = philox(places, pair, keys);
    V<int64_t> words[4];
    unroll<4>([&](int k) __attribute__((always_inline)) { words[k] = signed_low(c.w[k]); });
    put_noise<double, Ball>(noise, at, words);
    at += W;
  }
}

constexpr int kGroup = 2 * kLanes<uint64_t>;  // places whose noise is made at once

// How the places of a group are spread over its two vectors.
template <class C>
constexpr int lane_of(int i) {
  return sizeof(C) == 4 ? i / 2 + i % 2 * (kGroup / 2) : i;
}

template <class C>
struct Places {
  alignas(64) uint64_t at[kChunk];

  // Of the elements [begin, begin + n) of memory.
  void find(const Job& job, int64_t begin, int64_t n) {
    int64_t index[triplet::kDims], rest = begin;
    uint64_t place = 0;
    for (int d = job.ndim; d-- > 0; rest /= job.dims[d].size) {
      index[d] = rest % job.dims[d].size;
      place += static_cast<uint64_t>(index[d] * job.dims[d].step);
    }
    for (int64_t i = 0; i < n; ++i) {
      at[i - i % kGroup + lane_of<C>(static_cast<int>(i % kGroup))] = place;
      for (int d = job.ndim - 1; d >= 0; --d) {
        place += static_cast<uint64_t>(job.dims[d].step);
        if (++index[d] < job.dims[d].size) break;
        place -= static_cast<uint64_t>(index[d] * job.dims[d].step);
        index[d] = 0;
      }
    }
  }
};

TORCHLIN_INLINE U load_places(const uint64_t* p) {
  U v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Noise of n neighbours from `begin` on; ahead(i) is called on the way, for memory that will be wanted next.
template <class C, bool Ball, class F>
TORCHLIN_INLINE void fill(Noise<C>& noise, const Job& job, int64_t pair, int64_t begin, int64_t n, const Places<C>* places,
                          const F& ahead) {
  const uint32_t p = static_cast<uint32_t>(pair);
  uint64_t steps[kGroup];
  for (int i = 0; i < kGroup; ++i) steps[lane_of<C>(i)] = static_cast<uint64_t>(begin + i);
  U first = load_places(steps), second = load_places(steps + kGroup / 2);
  for (int64_t i = 0; i < n; i += kGroup) {
    ahead(i);
    if (places != nullptr) first = load_places(places->at + i), second = load_places(places->at + i + kGroup / 2);
    make_noise<Ball>(noise, i, first, second, p, job.keys);
    first += static_cast<uint64_t>(kGroup), second += static_cast<uint64_t>(kGroup);
  }
}

// The tensors of a call that lie as x does; those of three blocks are job.batch * job.size elements apart.
template <class T>
struct Stream {
  const T* base = nullptr;
  int64_t step = 0;  // between samples
  int blocks = 1;
  bool written = false;
};

// f(sample, begin, n, noise of x_a, of x_b) for every chunk of a sample in the units [begin, end).
template <class T, class F>
void for_each_chunk(const Job& job, int64_t begin, int64_t end, std::initializer_list<Stream<T>> streams, const F& f) {
  using C = compute_of<T>;
  Noise<C> noise;
  Places<C> places;
  const int64_t chunks = job.chunks(), pairs = job.pairs(), block = job.batch * job.size;
  int64_t found = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    // Places are looked up once for all samples: there the chunks come first.
    const int64_t pair = job.ndim ? unit % pairs : unit / chunks, chunk = job.ndim ? unit / pairs : unit % chunks;
    const int64_t first = chunk * kChunk, n = std::min(job.size - first, kChunk), count = std::min<int64_t>(2, job.batch - 2 * pair);
    if (job.ndim && chunk != found) places.find(job, first, n), found = chunk;
    // While noise is made memory has nothing to do: without this, arithmetic and memory would take their times in turn.
    const auto ahead = [&](int64_t i) __attribute__((always_inline)) {
      if (i * sizeof(T) % 64 != 0) return;
      for (const Stream<T>& stream : streams) {
        for (int64_t k = 0; k < stream.blocks; ++k) {
          for (int64_t s = 0; s < count; ++s) {
            const T* at = stream.base + k * block + (2 * pair + s) * stream.step + first + i;
            if (stream.written) __builtin_prefetch(at, 1);
            else __builtin_prefetch(at, 0);
          }
        }
      }
    };
    if (job.ball) fill<C, true>(noise, job, pair, first, n, job.ndim ? &places : nullptr, ahead);
    else fill<C, false>(noise, job, pair, first, n, job.ndim ? &places : nullptr, ahead);
    for (int64_t s = 0; s < count; ++s) f(2 * pair + s, first, n, noise.of[s][0], noise.of[s][1]);
  }
}

template <class T>
TORCHLIN_INLINE V<compute_of<T>> rounded(V<compute_of<T>> v) {
  if constexpr (sizeof(T) == 2) {
    alignas(64) T lanes[kLanes<float>];
    store(lanes, v);
    return load(lanes);
  } else {
    return v;
  }
}

template <class C>
TORCHLIN_INLINE V<C> clamp(V<C> v, V<C> low, V<C> high) {  // NaN stays
  v = v < low ? low : v;
  return v > high ? high : v;
}

// A whole vector, or what is left of one.
template <bool Whole>
struct Part {
  int64_t n;
  template <class T>
  TORCHLIN_INLINE V<compute_of<T>> get(const T* p) const {
    if constexpr (Whole) return load(p);
    else return load_n(p, n);
  }
  template <class T>
  TORCHLIN_INLINE void put(T* p, V<compute_of<T>> v) const {
    if constexpr (Whole) store(p, v);
    else store_n(p, v, n);
  }
};

// A chunk of one sample: its noise, with what that is multiplied with.
template <class C>
struct Chunk {
  const Job& job;
  const C *noise_a, *noise_b, *eps;
  int64_t first, n;
  V<C> unit, radius_a, radius_b;

  Chunk(const Job& j, int64_t sample, int64_t begin, int64_t count, const C* a, const C* b)
      : job(j), noise_a(a), noise_b(b), eps(static_cast<const C*>(j.eps) + sample * j.eps_step), first(begin), n(count),
        unit(splat(j.ball ? C(1) : C(0x1p-31))) {
    if (!job.ball) return;
    radius_a = splat(static_cast<C>(job.radius[sample]));
    radius_b = splat(static_cast<C>(job.radius[job.batch + sample]));
  }

  // g(i, part, a, b): noise of neighbours.
  template <class G>
  TORCHLIN_INLINE void for_each_vector(const G& g) const {
    constexpr int W = kLanes<C>;
    for (int64_t i = 0; i < n;) {
      const int64_t at = first + i, stop = job.run > 1 ? std::min(n, i + job.run - at % job.run) : n;
      const V<C> same = eps[at / job.run] * unit;
      for (; i + W <= stop; i += W) add(i, Part<true>{W}, same, g);
      if (i < stop) add(i, Part<false>{stop - i}, same, g);
      i = stop;
    }
  }

  template <class P, class G>
  TORCHLIN_INLINE void add(int64_t i, const P& part, V<C> scale, const G& g) const {
    V<C> a = load(noise_a + i), b = load(noise_b + i);
    if (job.run == 1) scale = part.get(eps + first + i) * unit;
    if (job.ball) a = times(a, radius_a), b = times(b, radius_b);
    g(i, part, times(a, scale), times(b, scale));
  }
};

template <class T, bool Clip>
void forward(const Job& job, int64_t begin, int64_t end) {
  using C = compute_of<T>;
  const T* const source = static_cast<const T*>(job.x);
  T* const target = static_cast<T*>(job.out);
  const int64_t block = job.batch * job.size;
  const V<C> low = splat(static_cast<C>(job.low)), high = splat(static_cast<C>(job.high));
  const auto chunk = [&](int64_t sample, int64_t first, int64_t n, const C* noise_a, const C* noise_b) {
    const T* const x = source + sample * job.x_step + first;
    T* const out = target + sample * job.size + first;
    const C alpha = static_cast<const C*>(job.mix)[sample];
    const V<C> mix = splat(alpha), rest = splat(1 - alpha);
    Chunk<C>(job, sample, first, n, noise_a, noise_b).for_each_vector([&](int64_t i, const auto& part, V<C> a, V<C> b)
                                                                           __attribute__((always_inline)) {
      const V<C> value = part.get(x + i);
      a = value + a, b = value + b;
      if constexpr (Clip) a = clamp<C>(a, low, high), b = clamp<C>(b, low, high);
      a = rounded<T>(a), b = rounded<T>(b);
      V<C> c = times(rest, a) + times(mix, b);
      if constexpr (Clip) c = clamp<C>(c, low, high);  // rounding alone can bring it out
      part.put(out + i, a), part.put(out + block + i, b), part.put(out + 2 * block + i, c);
    });
  };
  for_each_chunk<T>(job, begin, end, {{source, job.x_step, 1, false}, {target, job.size, 3, true}}, chunk);
}

// With clip: dx = [x + noise_a inside] (g_a + (1 - mix) g_c) + [x + noise_b inside] (g_b + mix g_c).
template <class T>
void backward(const Job& job, int64_t begin, int64_t end) {
  using C = compute_of<T>;
  const T *const source = static_cast<const T*>(job.x), *const slopes = static_cast<const T*>(job.grad);
  T* const target = static_cast<T*>(job.out);
  const int64_t block = job.batch * job.size;
  const V<C> low = splat(static_cast<C>(job.low)), high = splat(static_cast<C>(job.high)), none{};
  const auto chunk = [&](int64_t sample, int64_t first, int64_t n, const C* noise_a, const C* noise_b) {
    const T *const x = source + sample * job.x_step + first, *const grad = slopes + sample * job.size + first;
    T* const dx = target + sample * job.size + first;
    const C alpha = static_cast<const C*>(job.mix)[sample];
    const V<C> mix = splat(alpha), rest = splat(1 - alpha);
    Chunk<C>(job, sample, first, n, noise_a, noise_b).for_each_vector([&](int64_t i, const auto& part, V<C> a, V<C> b)
                                                                           __attribute__((always_inline)) {
      const V<C> value = part.get(x + i), g = part.get(grad + 2 * block + i);
      a = value + a, b = value + b;
      const V<C> ga = part.get(grad + i) + times(rest, g), gb = part.get(grad + block + i) + times(mix, g);
      const V<C> above = a >= low ? ga : none, left = a <= high ? above : none;
      const V<C> below = b <= high ? gb : none, right = b >= low ? below : none;
      part.put(dx + i, left + right);
    });
  };
  for_each_chunk<T>(job, begin, end, {{source, job.x_step, 1, false}, {slopes, job.size, 3, false}, {target, job.size, 1, true}},
                    chunk);
}

// A squared length as a whole number of 2^-bits; whatever the order of addition, the sum is the same.
template <class C>
int64_t length_of(const C* noise, int64_t n, int bits) {
  int64_t i = 0, total = 0;
  if constexpr (sizeof(C) == 4) {
    U sum{};  // squares of normal numbers are below 46: with 24 bits behind the point they are words
    for (; bits == 24 && i + kLanes<C> <= n; i += kLanes<C>) {
      const V<C> v = load(noise + i);
      const U words = (U) __builtin_convertvector(times(v, v) * 0x1p24f + 0.5f, V<int32_t>);
      sum += (words & 0xffffffff) + (words >> 32);
    }
    for (int k = 0; k < kLanes<uint64_t>; ++k) total += static_cast<int64_t>(sum[k]);
  }
  for (; i < n; ++i) {
    const double square = static_cast<double>(static_cast<C>(noise[i] * noise[i]));
    total += static_cast<int64_t>(square * static_cast<double>(int64_t{1} << bits) + 0.5);
  }
  return total;
}

// Adds the squared lengths of the samples' normal vectors to sums (2, batch).
template <class T>
void lengths(const Job& job, int64_t begin, int64_t end, int64_t* sums) {
  using C = compute_of<T>;
  for_each_chunk<T>(job, begin, end, {}, [&](int64_t sample, int64_t, int64_t n, const C* noise_a, const C* noise_b) {
    __atomic_fetch_add(sums + sample, length_of(noise_a, n, job.bits), __ATOMIC_RELAXED);
    __atomic_fetch_add(sums + job.batch + sample, length_of(noise_b, n, job.bits), __ATOMIC_RELAXED);
  });
}

template <class T>
constexpr triplet::Kernel kernel_of() {
  return {{&forward<T, false>, &forward<T, true>}, &backward<T>, &lengths<T>};
}
inline constexpr triplet::Kernel kKernels[] = {kernel_of<float>(), kernel_of<double>(), kernel_of<f16>(), kernel_of<bf16>()};

}  // namespace
