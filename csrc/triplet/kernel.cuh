// The points of a triplet on a device. A block makes neighbours of one pair of samples, since a counter makes noise for two; a
// thread makes kVector of them, 16 bytes a sample, or one where memory is not aligned to that. Bits are those of the CPU kernels.
#pragma once

#include "gpu/math.cuh"
#include "gpu/rounded.cuh"
#include "gpu/scalar.cuh"
#include "gpu/vec.cuh"
#include "triplet/job.h"

namespace torchlin::triplet {

inline constexpr int kThreads = 256;

template <class T>
inline constexpr int kVector = gpu::kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using compute_t = gpu::accumulate_t<T>;

using gpu::times;

TORCHLIN_INLINE float rooted(float v) {
#if defined(__CUDACC__)
  return __fsqrt_rn(v);
#else
  return std::sqrt(v);
#endif
}

template <int N>
TORCHLIN_INLINE float sum_of(const Series<N>& series, float z) {
  float sum = series.c[N - 1];
  gpu::static_for<N - 1>([&](auto i) { sum = times(sum, z) + series.c[N - 2 - i.value]; });
  return sum;
}

// normal_cpu.h has the same on vectors.
TORCHLIN_INLINE float log_fraction(float k) {
  constexpr int kTwoThirds = 0x3f2aaaab;
  const int bits = gpu::as_int(k), e = (bits - kTwoThirds) >> 23;
  const float f = gpu::as_float(bits - (e << 23)) - 1.0f, n = static_cast<float>(e - 31);
  const float tail = times(n, kLn2Low) + times(times(f, f), sum_of(log_series(), f));
  return times(n, kLn2High) + (f + tail);
}

TORCHLIN_INLINE void normal_pair(uint32_t a, int32_t b, float& x, float& y) {
  const float radius = rooted(-2.0f * log_fraction(static_cast<float>(static_cast<int>(a >> 1 | 1))));
  const float t = static_cast<float>(b | 1) * 0x1p-31f, sum = t + t + 12582912.0f;
  const int quarter = gpu::as_int(sum);
  const float r = t - (sum - 12582912.0f) * 0.5f, z = times(r, r);
  const float sine = times(r, sum_of(sine_series(), z)), cosine = sum_of(cosine_series(), z);
  const bool odd = quarter & 1;
  const uint32_t cosine_sign = static_cast<uint32_t>(quarter + 1) << 30 & 0x80000000u;
  const uint32_t sine_sign = static_cast<uint32_t>(quarter) << 30 & 0x80000000u;
  x = times(radius, gpu::bit_cast<float>(gpu::bit_cast<uint32_t>(odd ? sine : cosine) ^ cosine_sign));
  y = times(radius, gpu::bit_cast<float>(gpu::bit_cast<uint32_t>(odd ? cosine : sine) ^ sine_sign));
}

// Normal numbers, or odd whole ones of -2^31 ... 2^31.
template <bool Ball, class C>
TORCHLIN_INLINE void shape_noise(uint32_t a, uint32_t b, C& x, C& y) {
  if constexpr (Ball) {
    normal_pair(a, static_cast<int32_t>(b), x, y);
  } else {
    x = static_cast<C>(static_cast<int32_t>(a | 1)), y = static_cast<C>(static_cast<int32_t>(b | 1));
  }
}

// Where in a row-major sample an element of memory is.
TORCHLIN_INLINE uint64_t place_of(const Job& job, int64_t at) {
  if (job.ndim == 0) return static_cast<uint64_t>(at);
  uint64_t place = 0;
  TORCHLIN_NO_UNROLL
  for (int d = job.ndim - 1; d >= 0; --d) {
    const int64_t outer = at / job.dims[d].size;
    place += static_cast<uint64_t>((at - outer * job.dims[d].size) * job.dims[d].step);
    at = outer;
  }
  return place;
}

// What a block knows: its pair, where in it, and for each of its two samples mix and radii.
template <class C>
struct Around {
  int64_t pair, first;
  int count;  // samples in the pair
  gpu::shared_ptr<C> mix, radius;
};

inline int64_t slabs(const Job& job, int vector) {
  const int64_t slab = int64_t{kThreads} * vector;
  return (job.size + slab - 1) / slab;
}

template <class C>
TORCHLIN_INLINE Around<C> enter(const Job& job, const int64_t* seed, const int64_t* lengths, int vector, int64_t slabs) {
  Around<C> around;
  const int64_t block = blockIdx.x;
  around.pair = block / slabs;
  around.first = (block - around.pair * slabs) * kThreads * vector + int64_t{threadIdx.x} * vector;
  around.count = 2 * around.pair + 1 < job.batch ? 2 : 1;
  around.mix = gpu::dynamic_shared<C>();  // 2, then radius: (x_a, x_b) of each
  around.radius = around.mix + 2;
  if (static_cast<int>(threadIdx.x) < around.count) {
    const int s = static_cast<int>(threadIdx.x);
    const int64_t sample = 2 * around.pair + s;
    const Words words = philox(static_cast<uint64_t>(sample), 0, kSample, Keys(static_cast<uint64_t>(*seed)));
    around.mix[s] = static_cast<C>(mix_of(words.w[0]));
    if (lengths != nullptr) {
      around.radius[2 * s] = static_cast<C>(radius_of(lengths[sample], job.bits, words.w[1], job.size));
      around.radius[2 * s + 1] = static_cast<C>(radius_of(lengths[job.batch + sample], job.bits, words.w[2], job.size));
    }
  }
  __syncthreads();
  return around;
}

// The noise of N neighbours from `first` on in sample s, of words that were made for both.
template <bool Ball, int N, class C>
TORCHLIN_INLINE void noise_of(const Job& job, const Around<C>& around, double eps_all, const Words (&words)[N], int s, C (&a)[N], C (&b)[N]) {
  const C unit = Ball ? C(1) : C(0x1p-31), same = static_cast<C>(eps_all) * unit;
  const C* eps = job.eps == nullptr ? nullptr
                                    : static_cast<const C*>(job.eps) + (2 * around.pair + s) * job.eps_step;
  const int64_t which = eps == nullptr ? 0 : around.first / job.run;
  const int64_t within = around.first - which * job.run;  // of a run, which is at least as long as a vector, or 1
  gpu::static_for<N>([&](auto k) {
    constexpr int i = k.value;
    shape_noise<Ball>(words[i].w[2 * s], words[i].w[2 * s + 1], a[i], b[i]);
    C scale = same;
    if (eps != nullptr) scale = eps[which + (job.run == 1 ? i : within + i >= job.run)] * unit;
    if constexpr (Ball) a[i] = times(a[i], around.radius[2 * s]), b[i] = times(b[i], around.radius[2 * s + 1]);
    a[i] = times(a[i], scale), b[i] = times(b[i], scale);
  });
}

template <class T, int N>
TORCHLIN_INLINE gpu::Vec<T, N> get(const T* p) {
  if constexpr (N == 1) return {{*p}};
  else return gpu::load_vec<gpu::Vec<T, N>>(p);
}
template <class T, int N>
TORCHLIN_INLINE void put(T* p, const gpu::Vec<T, N>& v) {
  if constexpr (N == 1) *p = v[0];
  else gpu::store_vec(p, v);
}

template <class C>
TORCHLIN_INLINE C clamp(C v, C low, C high) {  // NaN stays
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <int N>
TORCHLIN_INLINE void make_words(const Job& job, int64_t pair, int64_t first, uint64_t seed, Words (&words)[N]) {
  const Keys keys(seed);
  gpu::static_for<N>([&](auto k) {
    words[k.value] = philox(place_of(job, first + k.value), static_cast<uint32_t>(pair), kNoise, keys);
  });
}

template <class T, int N, bool Ball>
__global__ void __launch_bounds__(kThreads)
    forward(const __grid_constant__ Job job, const int64_t* seed, const int64_t* lengths, double eps_all, int64_t slabs, void* mix) {
  using C = compute_t<T>;
  using V = gpu::Vec<T, N>;
  const Around<C> around = enter<C>(job, seed, lengths, N, slabs);
  if (around.first < N * int64_t{kThreads} && static_cast<int>(threadIdx.x) < around.count) {
    static_cast<C*>(mix)[2 * around.pair + threadIdx.x] = around.mix[static_cast<int>(threadIdx.x)];
  }
  if (around.first >= job.size) return;
  Words words[N];
  make_words(job, around.pair, around.first, static_cast<uint64_t>(*seed), words);
  const int64_t block = job.batch * job.size;
  const C low = static_cast<C>(job.low), high = static_cast<C>(job.high);
  gpu::static_for<2>([&](auto s) {
    if (s.value >= around.count) return;
    const int64_t sample = 2 * around.pair + s.value;
    const V x = get<T, N>(static_cast<const T*>(job.x) + sample * job.x_step + around.first);
    T* const out = static_cast<T*>(job.out) + sample * job.size + around.first;
    C a[N], b[N];
    noise_of<Ball>(job, around, eps_all, words, s.value, a, b);
    const C alpha = around.mix[s.value], rest = 1 - alpha;
    const V point_a = gpu::narrow_vec<T, N>([&](int i) { return clamp(gpu::widen(x[i]) + a[i], low, high); });
    const V point_b = gpu::narrow_vec<T, N>([&](int i) { return clamp(gpu::widen(x[i]) + b[i], low, high); });
    put<T, N>(out, point_a);
    put<T, N>(out + block, point_b);
    put<T, N>(out + 2 * block, gpu::narrow_vec<T, N>([&](int i) {
      return clamp(times(rest, gpu::widen(point_a[i])) + times(alpha, gpu::widen(point_b[i])), low, high);
    }));
  });
}

// With clip: dx = [x + noise_a inside] (g_a + (1 - mix) g_c) + [x + noise_b inside] (g_b + mix g_c).
template <class T, int N, bool Ball>
__global__ void __launch_bounds__(kThreads)
    backward(const __grid_constant__ Job job, const int64_t* seed, const int64_t* lengths, double eps_all, int64_t slabs) {
  using C = compute_t<T>;
  using V = gpu::Vec<T, N>;
  const Around<C> around = enter<C>(job, seed, lengths, N, slabs);
  if (around.first >= job.size) return;
  Words words[N];
  make_words(job, around.pair, around.first, static_cast<uint64_t>(*seed), words);
  const int64_t block = job.batch * job.size;
  const C low = static_cast<C>(job.low), high = static_cast<C>(job.high);
  gpu::static_for<2>([&](auto s) {
    if (s.value >= around.count) return;
    const int64_t sample = 2 * around.pair + s.value, at = sample * job.size + around.first;
    const T* const grad = static_cast<const T*>(job.grad) + at;
    const V x = get<T, N>(static_cast<const T*>(job.x) + sample * job.x_step + around.first);
    const V ga = get<T, N>(grad), gb = get<T, N>(grad + block), gc = get<T, N>(grad + 2 * block);
    C a[N], b[N];
    noise_of<Ball>(job, around, eps_all, words, s.value, a, b);
    const C alpha = around.mix[s.value], rest = 1 - alpha;
    put<T, N>(static_cast<T*>(job.out) + at, gpu::narrow_vec<T, N>([&](int i) {
      const C at_a = gpu::widen(x[i]) + a[i], at_b = gpu::widen(x[i]) + b[i], g = gpu::widen(gc[i]);
      const C left = at_a >= low && at_a <= high ? gpu::widen(ga[i]) + times(rest, g) : C(0);
      const C right = at_b >= low && at_b <= high ? gpu::widen(gb[i]) + times(alpha, g) : C(0);
      return left + right;
    }));
  });
}

template <class C>
TORCHLIN_INLINE unsigned long long length_of(C v, int bits) {
  const C square = times(v, v);
  if (sizeof(C) == 4 && bits == 24) {
    return static_cast<unsigned long long>(static_cast<int>(square * static_cast<C>(0x1p24) + C(0.5)));
  }
  return static_cast<unsigned long long>(static_cast<double>(square) * static_cast<double>(int64_t{1} << bits) + 0.5);
}

inline constexpr int kLengthElements = 16;  // of a thread

// Adds the squared lengths of the samples' normal vectors to sums (2, batch). Whole numbers: in any order the sum is the same.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lengths(const __grid_constant__ Job job, const int64_t* seed, int64_t slabs, unsigned long long* sums) {
  const int64_t pair = blockIdx.x / slabs, first = (blockIdx.x - pair * slabs) * kThreads * kLengthElements;
  const Keys keys(static_cast<uint64_t>(*seed));
  unsigned long long sum[4] = {};
  TORCHLIN_NO_UNROLL
  for (int k = 0; k < kLengthElements; ++k) {
    const int64_t at = first + k * kThreads + threadIdx.x;
    if (at >= job.size) break;
    const Words words = philox(place_of(job, at), static_cast<uint32_t>(pair), kNoise, keys);
    gpu::static_for<2>([&](auto s) {
      C a, b;
      normal_pair(words.w[2 * s.value], static_cast<int32_t>(words.w[2 * s.value + 1]), a, b);
      sum[s.value] += length_of(a, job.bits), sum[2 + s.value] += length_of(b, job.bits);
    });
  }
  const gpu::shared_ptr<unsigned long long> warps = gpu::dynamic_shared<unsigned long long>();  // (4, warps)
  constexpr int kWarps = kThreads / 32;
  gpu::static_for<4>([&](auto k) {
    for (int d = 16; d > 0; d /= 2) sum[k.value] += __shfl_down_sync(0xffffffffu, sum[k.value], d);
    if (threadIdx.x % 32 == 0) warps[k.value * kWarps + static_cast<int>(threadIdx.x) / 32] = sum[k.value];
  });
  __syncthreads();
  if (threadIdx.x >= 4) return;
  const int k = static_cast<int>(threadIdx.x), s = k & 1;
  if (2 * pair + s >= job.batch) return;
  unsigned long long total = 0;
  for (int w = 0; w < kWarps; ++w) total += warps[k * kWarps + w];
  atomicAdd(sums + (k >> 1) * job.batch + 2 * pair + s, total);
}

}  // namespace torchlin::triplet
