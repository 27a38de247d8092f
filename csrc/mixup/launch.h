// How the kernels are launched, on a device or on the emulator: `launch(kernel, grid, threads, shared bytes, args...)`.
#pragma once

#include <algorithm>

#include "mixup/kernel.cuh"

namespace torchlin::mixup {

template <class T>
bool in_vectors(int64_t row, const void* a, const void* b) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return row % kVector<T> == 0 && addresses % gpu::kVectorBytes == 0;
}

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// f(vectors or elements, as a constant) with how many there are.
template <class T, class F>
void with_vectors(int64_t total, int64_t row, const void* a, const void* b, const F& f) {
  if (in_vectors<T>(row, a, b)) f(gpu::constant<kVector<T>>{}, blocks_for(total / kVector<T>));
  else f(gpu::constant<1>{}, blocks_for(total));
}

template <class T, class Launch>
void launch_forward(const Mix& mix, double lam, const void* lams, const Launch& launch) {
  using C = compute_t<T>;
  const Weights<C> weights{static_cast<const C*>(lams), static_cast<C>(lam), static_cast<C>(1 - lam)};
  with_vectors<T>(mix.outer * mix.batch * mix.inner, mix.inner, mix.x, mix.out, [&](auto n, unsigned grid) {
    launch(&forward<T, decltype(n)::value>, grid, kThreads, 0, mix, weights);
  });
}

template <class Launch>
void launch_link(const int64_t* partner, int64_t batch, int64_t* head, int64_t* next, const Launch& launch) {
  launch(&link, blocks_for(batch), kThreads, 0, partner, batch, head, next);
}

template <class T, class Launch>
void launch_backward(const Mix& mix, double lam, const void* lams, const Launch& launch) {
  using C = compute_t<T>;
  const Weights<C> weights{static_cast<const C*>(lams), static_cast<C>(lam), static_cast<C>(1 - lam)};
  with_vectors<T>(mix.outer * mix.batch * mix.inner, mix.inner, mix.x, mix.out, [&](auto n, unsigned grid) {
    launch(&backward<T, decltype(n)::value>, grid, kThreads, 0, mix, weights);
  });
}

inline int lam_parts_of(const Mix& mix) {
  const int64_t elements = 16 * kThreads;  // worth a block
  return static_cast<int>(std::min<int64_t>(kLamBlocks, (mix.outer * mix.inner + elements - 1) / elements));
}

// sums: room for lam_parts_of(mix) doubles a sample.
template <class T, class Launch>
void launch_lam_backward(const Mix& mix, double* sums, void* out, const Launch& launch) {
  const int parts = lam_parts_of(mix);
  launch(&lam_parts<T>, static_cast<unsigned>(mix.batch * parts), kThreads, kThreads / 32 * sizeof(double), mix, parts, sums);
  using C = compute_t<T>;
  const double* const done = sums;
  launch(&add_parts<C>, blocks_for(mix.batch), kThreads, 0, done, mix.batch, parts, static_cast<C*>(out));
}

template <class T, class Launch>
void launch_cut(const Cut& cut, bool backward, const Launch& launch) {
  with_vectors<T>(cut.sample() * cut.batch, cut.row(), cut.x, cut.out, [&](auto n, unsigned grid) {
    constexpr int kWidth = decltype(n)::value;
    launch(backward ? &cut_backward<T, kWidth> : &cut_forward<T, kWidth>, grid, kThreads, 0, cut);
  });
}

}  // namespace torchlin::mixup
