// mixup and cutmix on a device. A thread works on 16 bytes of neighbours where rows are made of those, else on one element.
#pragma once

#include "gpu/math.cuh"
#include "gpu/rounded.cuh"
#include "gpu/scalar.cuh"
#include "gpu/vec.cuh"
#include "mixup/job.h"

namespace torchlin::mixup {

inline constexpr int kThreads = 256;

template <class T>
inline constexpr int kVector = gpu::kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using compute_t = gpu::accumulate_t<T>;

using gpu::times;

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

// A partner that is none stops the device, as torch's own indexing does, before anything is read by it.
TORCHLIN_INLINE int64_t partner_of(const int64_t* partner, int64_t sample, int64_t batch) {
  const int64_t other = partner[sample];
  if (other < 0 || other >= batch) {
#if defined(__CUDACC__)
    __trap();
#else
    simt::detail::fail("partner out of range");
#endif
  }
  return other;
}

// λ of samples: a tensor, or the same for all where there is none; what is left of 1 is rounded where λ was.
template <class C>
struct Weights {
  const C* each;
  C same, same_rest;
  TORCHLIN_INLINE C lam(int64_t sample) const { return each != nullptr ? each[sample] : same; }
  TORCHLIN_INLINE C rest(int64_t sample) const { return each != nullptr ? 1 - each[sample] : same_rest; }
};

// The vector of this thread: its position, and which sample it belongs to.
struct Place {
  int64_t at, sample, outer, within;
  bool inside;
};
template <int N>
TORCHLIN_INLINE Place place_of(const Mix& mix) {
  Place p{};
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, in_row = mix.inner / N;
  p.inside = vector < mix.outer * mix.batch * in_row;
  const int64_t row = vector / in_row;
  p.within = (vector - row * in_row) * N;
  p.outer = row / mix.batch, p.sample = row - p.outer * mix.batch;
  p.at = vector * N;
  return p;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) forward(const Mix mix, Weights<compute_t<T>> weights) {
  const Place p = place_of<N>(mix);
  if (!p.inside) return;
  const T* const x = static_cast<const T*>(mix.x);
  const auto own = get<T, N>(x + p.at), other = get<T, N>(x + mix.row(p.outer, partner_of(mix.partner, p.sample, mix.batch)) + p.within);
  const compute_t<T> lam = weights.lam(p.sample), rest = weights.rest(p.sample);
  put<T, N>(static_cast<T*>(mix.out) + p.at, gpu::narrow_vec<T, N>([&](int i) {
    return times(lam, gpu::widen(own[i])) + times(rest, gpu::widen(other[i]));
  }));
}

// head and next of job.h, each sample by a thread: the first of those with its partner begins the list, every one finds the next.
static __global__ void __launch_bounds__(kThreads) link(const int64_t* partner, int64_t batch, int64_t* head, int64_t* next) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch) return;
  const int64_t own = partner_of(partner, i, batch);
  int64_t first = -1, after = -1;
  for (int64_t k = batch; k-- > 0;) {
    if (partner[k] == i) first = k;
    if (k > i && partner[k] == own) after = k;
  }
  head[i] = first, next[i] = after;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) backward(const Mix mix, Weights<compute_t<T>> weights) {
  using C = compute_t<T>;
  const Place p = place_of<N>(mix);
  if (!p.inside) return;
  const T* const grad = static_cast<const T*>(mix.x);
  const auto own = get<T, N>(grad + p.at);
  const C lam = weights.lam(p.sample);
  C sum[N];
  gpu::static_for<N>([&](auto i) { sum[i.value] = times(lam, gpu::widen(own[i.value])); });
  for (int64_t k = mix.head[p.sample]; k >= 0; k = mix.next[k]) {
    const auto part = get<T, N>(grad + mix.row(p.outer, k) + p.within);
    const C rest = weights.rest(k);
    gpu::static_for<N>([&](auto i) { sum[i.value] += times(rest, gpu::widen(part[i.value])); });
  }
  put<T, N>(static_cast<T*>(mix.out) + p.at, gpu::narrow_vec<T, N>([&](int i) { return sum[i]; }));
}

inline constexpr int kLamBlocks = 32;  // of a sample, at most

// <grad_i, x_i - x_partner(i)>: block (sample, part) sums a part of the sample into parts (samples, part).
template <class T>
__global__ void __launch_bounds__(kThreads) lam_parts(const Mix mix, int parts, double* sums) {
  using C = compute_t<T>;
  const int64_t sample = blockIdx.x / parts, other = partner_of(mix.partner, sample, mix.batch);
  const int part = static_cast<int>(blockIdx.x - sample * parts);
  const T *const grad = static_cast<const T*>(mix.x), *const x = static_cast<const T*>(mix.other);
  const int64_t size = mix.outer * mix.inner;
  C sum = 0;
  for (int64_t e = part * int64_t{kThreads} + threadIdx.x; e < size; e += int64_t{parts} * kThreads) {
    const int64_t o = e / mix.inner, i = e - o * mix.inner;
    const int64_t own = mix.row(o, sample) + i;
    sum += times(gpu::widen(grad[own]), gpu::widen(x[own]) - gpu::widen(x[mix.row(o, other) + i]));
  }
  double total = sum;
  for (int d = 16; d > 0; d /= 2) total += __shfl_down_sync(0xffffffffu, total, d);
  const gpu::shared_ptr<double> warps = gpu::dynamic_shared<double>();
  if (threadIdx.x % 32 == 0) warps[static_cast<int>(threadIdx.x) / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  sums[blockIdx.x] = total;
}

template <class C>
__global__ void __launch_bounds__(kThreads) add_parts(const double* sums, int64_t batch, int parts, C* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch) return;
  double total = 0;
  for (int k = 0; k < parts; ++k) total += sums[i * parts + k];
  out[i] = static_cast<C>(total);
}

// The vector of this thread in a batch of images.
struct Spot {
  int64_t at, sample, within;  // of the whole tensor; of its sample
  int64_t height, column;      // the row, and where in it
  bool inside;
};
template <int N>
TORCHLIN_INLINE Spot spot_of(const Cut& cut) {
  Spot s{};
  s.at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  const int64_t size = cut.sample();
  s.inside = s.at < size * cut.batch;
  s.sample = s.at / size, s.within = s.at - s.sample * size;
  const int64_t line = s.within / cut.row();
  s.column = s.within - line * cut.row();
  s.height = line / cut.between % cut.height;
  return s;
}

// Which elements [low, high) of a row a sample's box takes; none in a row that it has no part in.
struct Range {
  int64_t low, high;
};
TORCHLIN_INLINE Range range_of(const Cut& cut, int64_t sample, int64_t height) {
  const int64_t* const box = cut.boxes + sample * cut.box_step;
  if (height < box[0] || height >= box[1]) return {0, 0};
  return {box[2] * cut.depth, box[3] * cut.depth};
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) cut_forward(const Cut cut) {
  const Spot s = spot_of<N>(cut);
  if (!s.inside) return;
  const T* const x = static_cast<const T*>(cut.x);
  const Range range = range_of(cut, s.sample, s.height);
  auto out = get<T, N>(x + s.at);
  if (s.column + N > range.low && s.column < range.high) {
    const auto other = get<T, N>(x + partner_of(cut.partner, s.sample, cut.batch) * cut.sample() + s.within);
    gpu::static_for<N>([&](auto i) {
      if (s.column + i.value >= range.low && s.column + i.value < range.high) out[i.value] = other[i.value];
    });
  }
  put<T, N>(static_cast<T*>(cut.out) + s.at, out);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) cut_backward(const Cut cut) {
  using C = compute_t<T>;
  const Spot s = spot_of<N>(cut);
  if (!s.inside) return;
  const T* const grad = static_cast<const T*>(cut.x);
  const Range range = range_of(cut, s.sample, s.height);
  const auto own = get<T, N>(grad + s.at);
  C sum[N];
  gpu::static_for<N>([&](auto i) {
    const bool cut_out = s.column + i.value >= range.low && s.column + i.value < range.high;
    sum[i.value] = cut_out ? C(0) : gpu::widen(own[i.value]);
  });
  for (int64_t k = cut.head[s.sample]; k >= 0; k = cut.next[k]) {
    const Range there = range_of(cut, k, s.height);
    if (s.column + N <= there.low || s.column >= there.high) continue;
    const auto part = get<T, N>(grad + k * cut.sample() + s.within);
    gpu::static_for<N>([&](auto i) {
      if (s.column + i.value >= there.low && s.column + i.value < there.high) sum[i.value] += gpu::widen(part[i.value]);
    });
  }
  put<T, N>(static_cast<T*>(cut.out) + s.at, gpu::narrow_vec<T, N>([&](int i) { return sum[i]; }));
}

}  // namespace torchlin::mixup
