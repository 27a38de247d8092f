// How a job is launched, on a device or on the emulator: `launch(kernel, grid, threads, shared bytes, arguments...)`.
#pragma once

#include <algorithm>

#include "linearity/kernel.cuh"

namespace torchlin::linearity {

inline constexpr int64_t kWarpRow = 512;  // classes up to which a warp has a sample

bool takes_vectors(const Job& job) {
  constexpr int64_t kWidth = gpu::kVectorBytes / static_cast<int>(sizeof(float));
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % gpu::kVectorBytes == 0; };
  bool all = job.classes % kWidth == 0 && (job.dlogits == nullptr || aligned(job.dlogits));
  for (int t = 0; t < 3; ++t) all = all && aligned(job.logits[t]) && job.row_step[t] % kWidth == 0;
  return all;
}

template <Base kBase, bool kGradient, bool kOfBlock, class Launch>
void launch_samples(const Job& job, const Launch& launch) {
  constexpr int kWidth = gpu::kVectorBytes / static_cast<int>(sizeof(float));
  const bool vectors = takes_vectors(job);
  const auto kernel = vectors ? &linearity_samples<kBase, kGradient, kOfBlock, kWidth>
                              : &linearity_samples<kBase, kGradient, kOfBlock, 1>;
  if constexpr (kOfBlock) {
    const int64_t steps = job.classes / (vectors ? kWidth : 1);
    const int threads = steps >= 1024 ? kMostThreads : 256;
    launch(kernel, static_cast<unsigned>(job.samples), threads, kShared * sizeof(double), job);
  } else {
    constexpr int64_t kSamples = kBlock / kWarp;
    launch(kernel, static_cast<unsigned>((job.samples + kSamples - 1) / kSamples), kBlock, 0, job);
  }
}

template <class Launch>
void launch_kernel(const Job& job, const Launch& launch) {
  const auto of_group = [&](auto base, auto gradient) {
    constexpr Base kBase = decltype(base)::value;
    constexpr bool kGradient = decltype(gradient)::value;
    if (job.classes <= kWarpRow) launch_samples<kBase, kGradient, false>(job, launch);
    else launch_samples<kBase, kGradient, true>(job, launch);
  };
  const auto of_base = [&](auto base) {
    if (job.dlogits != nullptr) of_group(base, std::true_type{});
    else of_group(base, std::false_type{});
  };
  if (job.dense != nullptr || (job.smoothing != 0 && job.weight != nullptr)) {
    of_base(std::integral_constant<Base, Base::row>{});
  } else if (job.smoothing != 0) {
    of_base(std::integral_constant<Base, Base::constant>{});
  } else {
    of_base(std::integral_constant<Base, Base::none>{});
  }
}

// Everything of one call. `value` may be null; `scratch` holds samples + 1 doubles.
template <class Launch>
void run(Job job, bool mean, bool reduced, float* value, double* scratch, const Launch& launch) {
  constexpr size_t kSums = kReduceThreads / kWarp * sizeof(double);
  job.penalties = value != nullptr ? scratch + 1 : nullptr;
  job.scale = mean ? 1 / static_cast<double>(job.samples) : 1;
  if (mean && job.labels != nullptr) {
    launch(&linearity_count, 1u, kReduceThreads, kSums, job, scratch);
    job.scale_at = scratch;
  }
  if (job.samples > 0) launch_kernel(job, launch);
  if (value == nullptr) return;
  if (reduced) {
    launch(&linearity_reduce, 1u, kReduceThreads, kSums, job, value);
  } else if (job.samples > 0) {
    const unsigned blocks = static_cast<unsigned>((job.samples + kReduceThreads - 1) / kReduceThreads);
    launch(&linearity_copy, blocks, kReduceThreads, size_t{0}, job, value);
  }
}

template <class Launch>
void run_scale(float* rows, int64_t width, const float* factor, int64_t step, int64_t samples, const Launch& launch) {
  if (samples == 0) return;
  const int threads = width >= 1024 ? 256 : 64;
  launch(&linearity_scale, static_cast<unsigned>(3 * samples), threads, size_t{0}, rows, width, factor, step, samples);
}

}  // namespace torchlin::linearity
