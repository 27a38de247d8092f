// How the kernels of a job are launched, on a device or on the emulator: `launch(kernel, grid, threads, shared bytes, args...)`.
#pragma once

#include "triplet/kernel.cuh"

namespace torchlin::triplet {

// Whether all samples of a tensor start at whole vectors.
inline bool aligned(const void* data, int64_t step_bytes) {
  return reinterpret_cast<uintptr_t>(data) % gpu::kVectorBytes == 0 && step_bytes % gpu::kVectorBytes == 0;
}

template <class T>
bool takes_vectors(const Job& job) {
  constexpr int64_t kSize = sizeof(T);
  if (job.size % kVector<T> != 0) return false;
  return aligned(job.x, job.x_step * kSize) && aligned(job.out, job.size * kSize) &&
         (job.grad == nullptr || aligned(job.grad, job.size * kSize));
}

// mix is written even where samples are empty: there is always a block for a pair.
template <class T, class Launch>
void launch_forward(const Job& job, const int64_t* seed, const int64_t* lengths, double eps, void* mix, const Launch& launch) {
  if (job.batch == 0) return;
  using C = compute_t<T>;
  const auto run = [&](auto n) {
    constexpr int kWidth = decltype(n)::value;
    const int64_t in_pair = std::max<int64_t>(1, slabs(job, kWidth));
    const unsigned grid = static_cast<unsigned>(job.pairs() * in_pair);
    const auto kernel = lengths != nullptr ? &forward<T, kWidth, true> : &forward<T, kWidth, false>;
    launch(kernel, grid, kThreads, 6 * sizeof(C), job, seed, lengths, eps, in_pair, mix);
  };
  if (takes_vectors<T>(job)) run(gpu::constant<kVector<T>>{});
  else run(gpu::constant<1>{});
}

template <class T, class Launch>
void launch_backward(const Job& job, const int64_t* seed, const int64_t* lengths, double eps, const Launch& launch) {
  if (job.batch == 0 || job.size == 0) return;
  using C = compute_t<T>;
  const auto run = [&](auto n) {
    constexpr int kWidth = decltype(n)::value;
    const int64_t in_pair = slabs(job, kWidth);
    const unsigned grid = static_cast<unsigned>(job.pairs() * in_pair);
    const auto kernel = lengths != nullptr ? &backward<T, kWidth, true> : &backward<T, kWidth, false>;
    launch(kernel, grid, kThreads, 6 * sizeof(C), job, seed, lengths, eps, in_pair);
  };
  if (takes_vectors<T>(job)) run(gpu::constant<kVector<T>>{});
  else run(gpu::constant<1>{});
}

template <class C, class Launch>
void launch_lengths(const Job& job, const int64_t* seed, unsigned long long* sums, const Launch& launch) {
  if (job.batch == 0 || job.size == 0) return;
  const int64_t in_pair = slabs(job, kLengthElements);
  const unsigned grid = static_cast<unsigned>(job.pairs() * in_pair);
  launch(&lengths<C>, grid, kThreads, 4 * (kThreads / 32) * sizeof(unsigned long long), job, seed, in_pair, sums);
}

}  // namespace torchlin::triplet
