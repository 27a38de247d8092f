// The three-point loss on a device: a group of threads, a warp or a block, has a sample and reads its three rows twice, the
// second time from cache. Sums go through one tree of shuffles and one order of warps: the same bits from every run.
#pragma once

#include <cmath>

#include "gpu/math.cuh"
#include "gpu/scalar.cuh"
#include "gpu/vec.cuh"
#include "linearity/job.h"

namespace torchlin::linearity {

inline constexpr int kWarp = 32;
inline constexpr int kBlock = 128;      // threads, where a warp has a sample
inline constexpr int kMostThreads = 512;  // where a block has one: with 1024, registers would not do
inline constexpr unsigned kFull = 0xffffffffu;

using gpu::exponential;
TORCHLIN_INLINE float larger(float a, float b) {  // either, if one is NaN
  return a > b ? a : b;
}

// As torch's: a kernel cannot return an error.
TORCHLIN_INLINE void require_class(bool is_one) {
#if defined(__CUDACC__)
  if (!is_one) __trap();
#else
  if (!is_one) simt::detail::fail("a class number out of range");
#endif
}

// The target distribution of a sample: T_k = base_k, plus the shares of the classes that labels name.
template <Base kBase>
struct Target {
  const float *dense, *weight;
  float kept, spread;  // (1 - s), s / K
  double spread_exactly;
  int64_t named[2];
  double share[2];

  TORCHLIN_INLINE float base(int64_t k) const {
    if constexpr (kBase == Base::none) {
      return 0;
    } else if constexpr (kBase == Base::constant) {
      return spread;
    } else {
      const float t = dense == nullptr ? spread : kept * dense[k] + spread;
      return weight == nullptr || t == 0.0f ? t : t * weight[k];
    }
  }
  TORCHLIN_INLINE double weighted(double t, int64_t k) const {
    return weight == nullptr || t == 0 ? t : t * static_cast<double>(weight[k]);
  }
  TORCHLIN_INLINE bool names(int64_t k) const { return k == named[0] || k == named[1]; }
  TORCHLIN_INLINE double at(int64_t k) const {
    return (kBase == Base::constant ? spread_exactly : static_cast<double>(base(k))) + (k == named[0] ? share[0] : 0.0) + (k == named[1] ? share[1] : 0.0);
  }
};

// What a row comes to: the largest logit, the sum of exp(z - top), and the inner product with the base.
struct Row {
  float top;
  double sum, inner;
};
TORCHLIN_INLINE float shift_of(float top) {  // what is not there has no part: exp(-inf - 0) is 0
  return top == -static_cast<float>(INFINITY) ? 0.0f : top;
}
TORCHLIN_INLINE Row merge(const Row& a, const Row& b) {
  const float top = larger(a.top, b.top), shift = shift_of(top);
  const double sum = a.sum * static_cast<double>(exponential(a.top - shift)) + b.sum * static_cast<double>(exponential(b.top - shift));
  return {top, sum, a.inner + b.inner};
}
TORCHLIN_INLINE Row merge_warp(Row row) {
  TORCHLIN_UNROLL
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const Row other{__shfl_xor_sync(kFull, row.top, bits), __shfl_xor_sync(kFull, row.sum, bits),
                       __shfl_xor_sync(kFull, row.inner, bits)};
    row = merge(row, other);
  }
  return row;
}
TORCHLIN_INLINE double add_warp(double v) {
  TORCHLIN_UNROLL
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kFull, v, bits);
  return v;
}

// This thread's part of a row: vectors of kWidth, one after the other, `threads` apart.
template <Base kBase, int kWidth>
TORCHLIN_INLINE Row read_row(const float* z, const Target<kBase>& target, int64_t n, int thread, int threads) {
  float top = -static_cast<float>(INFINITY), sum = 0, inner = 0;
  for (int64_t k = static_cast<int64_t>(thread) * kWidth; k < n; k += static_cast<int64_t>(threads) * kWidth) {
    const auto v = gpu::load_vec<gpu::Vec<float, kWidth>>(z + k);
    float most = top;
    gpu::static_for<kWidth>([&](auto i) { most = larger(v[i.value], most); });
    const float shift = shift_of(most);
    sum *= exponential(top - shift);
    gpu::static_for<kWidth>([&](auto i) { sum += exponential(v[i.value] - shift); });
    if constexpr (kBase != Base::none) {
      gpu::static_for<kWidth>([&](auto i) {
        const float t = kBase == Base::constant ? 1.0f : target.base(k + i.value);
        inner += t == 0.0f ? 0.0f : t * v[i.value];
      });
    }
    top = most;
  }
  return {top, static_cast<double>(sum), static_cast<double>(inner)};
}

struct Curve {
  double value, slope;
};
TORCHLIN_INLINE Curve penalize(Penalty penalty, double beta, double r) {
  if (penalty == Penalty::square) return {r * r, 2 * r};
  const double size = r < 0 ? -r : r, sign = r != r ? r : r > 0 ? 1.0 : r < 0 ? -1.0 : 0.0;
  if (penalty == Penalty::abs) return {size, sign};
  if (size < beta) return {r * r * (0.5 / beta), r / beta};
  return {size - 0.5 * beta, sign};
}

// What the threads of a block tell each other, in doubles: of every warp, what its parts of the three rows come to and a part of
// the base's sum; of all, three coefficients a row.
inline constexpr int kOfWarp = 10, kShared = kMostThreads / kWarp * kOfWarp + 9;

// One sample for a block (kOfBlock), or for each of its warps.
template <Base kBase, bool kGradient, bool kOfBlock, int kWidth>
__global__ void __launch_bounds__(kOfBlock ? kMostThreads : kBlock) linearity_samples(Job job) {
  const int threads = kOfBlock ? static_cast<int>(blockDim.x) : kWarp;
  const int thread = kOfBlock ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t sample = kOfBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + warp;
  if (sample >= job.samples) return;  // a whole warp, and no block waits for it
  const int64_t n = job.classes, samples = job.samples;

  Target<kBase> target{};
  target.dense = job.dense == nullptr ? nullptr : static_cast<const float*>(job.dense) + sample * n;
  target.weight = static_cast<const float*>(job.weight);
  target.spread_exactly = job.smoothing / static_cast<double>(n);
  target.kept = static_cast<float>(1 - job.smoothing), target.spread = static_cast<float>(target.spread_exactly);
  target.named[0] = target.named[1] = -1;
  double total = 0;
  if (job.labels != nullptr) {
    const int64_t first = job.labels[sample], second = job.others == nullptr ? first : job.others[sample];
    if (first == job.ignore_index || second == job.ignore_index) {
      if (thread == 0) {
        if (job.penalties != nullptr) job.penalties[sample] = 0;
        if (kGradient && job.dmix != nullptr) static_cast<float*>(job.dmix)[sample] = 0;
        for (int t = 0; job.losses != nullptr && t < 3; ++t) static_cast<float*>(job.losses)[t * samples + sample] = 0;
      }
      if constexpr (kGradient) {
        for (int t = 0; t < 3; ++t) {
          float* d = static_cast<float*>(job.dlogits) + (t * samples + sample) * n;
          for (int64_t k = thread; k < n; k += threads) d[k] = 0;
        }
      }
      return;
    }
    require_class(first >= 0 && first < n && second >= 0 && second < n);
    const double kept = 1 - job.smoothing;
    const double lam = job.others == nullptr ? 1.0 : static_cast<double>(static_cast<const float*>(job.lam)[sample * job.lam_step]);
    target.named[0] = first;
    target.share[0] = target.weighted(kept * lam, first);
    if (job.others != nullptr) {
      target.named[1] = second;
      target.share[1] = target.weighted(kept * (1 - lam), second);
    }
    total = target.share[0] + target.share[1];
  }

  const float* z[3];
  Row row[3];
  gpu::static_for<3>([&](auto t) {
    z[t.value] = static_cast<const float*>(job.logits[t.value]) + sample * job.row_step[t.value];
    row[t.value] = merge_warp(read_row<kBase, kWidth>(z[t.value], target, n, thread, threads));
  });
  if constexpr (kBase == Base::constant) total += target.spread_exactly * static_cast<double>(n);
  double base_total = 0;
  if constexpr (kBase == Base::row) {
    for (int64_t k = thread; k < n; k += threads) base_total += static_cast<double>(target.base(k));
    base_total = add_warp(base_total);
  }

  [[maybe_unused]] const auto shared = gpu::dynamic_shared<double>(), common = shared + (kShared - 9);
  if constexpr (kOfBlock) {
    if (lane == 0) {
      gpu::static_for<3>([&](auto t) {
        const int at = warp * kOfWarp + 3 * t.value;
        shared[at] = static_cast<double>(row[t.value].top);
        shared[at + 1] = row[t.value].sum;
        shared[at + 2] = row[t.value].inner;
      });
      shared[warp * kOfWarp + 9] = base_total;
    }
    __syncthreads();
  }
  float shift[3];
  double c[3], q[3];
  if (!kOfBlock || warp == 0) {
    // Lanes 0, 1 and 2 have a row each: one logarithm's time for three.
    const int own = lane < 3 ? lane : 0;
    Row mine = own == 0 ? row[0] : own == 1 ? row[1] : row[2];
    if constexpr (kOfBlock) {
      mine = {-INFINITY, 0, 0};
      base_total = 0;
      for (int w = 0; w < threads / kWarp; ++w) {
        const int at = w * kOfWarp + 3 * own;
        const double top = shared[at], sum = shared[at + 1], inner = shared[at + 2];
        mine = merge(mine, Row{static_cast<float>(top), sum, inner});
        base_total += shared[w * kOfWarp + 9];
      }
    }
    total += base_total;
    const float* own_z = own == 0 ? z[0] : own == 1 ? z[1] : z[2];
    if (mine.top == -INFINITY) mine.sum = NAN;  // nothing but masked classes
    // By differences from the largest logit: of one class all of them are 0.
    const double top = static_cast<double>(mine.top), log_sum = log(mine.sum);
    double loss = 0;
    if constexpr (kBase == Base::constant) {
      const double count = static_cast<double>(n);
      loss = target.spread_exactly * (count * log_sum - (mine.inner - count * top));
    }
    if constexpr (kBase == Base::row) loss = base_total * (top + log_sum) - mine.inner;
    TORCHLIN_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (target.named[j] >= 0 && target.share[j] != 0) {
        loss += target.share[j] * (log_sum - (static_cast<double>(own_z[target.named[j]]) - top));
      }
    }
    if (mine.sum != mine.sum) loss = mine.sum;
    const double a = __shfl_sync(kFull, loss, 0), b = __shfl_sync(kFull, loss, 1), at = __shfl_sync(kFull, loss, 2);
    if (job.losses != nullptr && lane < 3) static_cast<float*>(job.losses)[lane * samples + sample] = static_cast<float>(loss);
    const double mix = static_cast<double>(static_cast<const float*>(job.mix)[sample * job.mix_step]);
    const Curve h = penalize(job.penalty, job.beta, (at - a) - mix * (b - a));
    if (job.penalties != nullptr && lane == 0) job.penalties[sample] = h.value;
    if constexpr (kGradient) {
      const double g =
          job.grad_value == nullptr ? 1.0 : static_cast<double>(static_cast<const float*>(job.grad_value)[sample * job.grad_value_step]);
      const double rho = g * (job.scale_at == nullptr ? job.scale : *job.scale_at) * h.slope;
      if (job.dmix != nullptr && lane == 0) static_cast<float*>(job.dmix)[sample] = static_cast<float>(rho * (a - b));
      double own_q = own == 0 ? (mix - 1) * rho : own == 1 ? -mix * rho : rho;
      if (job.grad_losses != nullptr) own_q += static_cast<double>(static_cast<const float*>(job.grad_losses)[own * samples + sample]);
      const double own_c = own_q * total / mine.sum;
      gpu::static_for<3>([&](auto t) {
        shift[t.value] = __shfl_sync(kFull, mine.top, t.value);
        c[t.value] = __shfl_sync(kFull, own_c, t.value);
        q[t.value] = __shfl_sync(kFull, own_q, t.value);
      });
      if constexpr (kOfBlock) {
        if (lane == 0) {
          gpu::static_for<3>([&](auto t) {
            common[3 * t.value] = static_cast<double>(shift[t.value]);
            common[3 * t.value + 1] = c[t.value];
            common[3 * t.value + 2] = q[t.value];
          });
        }
      }
    }
  }
  if constexpr (kGradient) {
    if constexpr (kOfBlock) {
      __syncthreads();
      gpu::static_for<3>([&](auto t) {
        shift[t.value] = static_cast<float>(static_cast<double>(common[3 * t.value]));
        c[t.value] = common[3 * t.value + 1];
        q[t.value] = common[3 * t.value + 2];
      });
    }
    gpu::static_for<3>([&](auto t) {
      float* d = static_cast<float*>(job.dlogits) + (t.value * samples + sample) * n;
      const float factor = static_cast<float>(c[t.value]), share = static_cast<float>(q[t.value]);
      for (int64_t k = static_cast<int64_t>(thread) * kWidth; k < n; k += static_cast<int64_t>(threads) * kWidth) {
        const auto v = gpu::load_vec<gpu::Vec<float, kWidth>>(z[t.value] + k);
        gpu::Vec<float, kWidth> out;
        gpu::static_for<kWidth>([&](auto i) {
          const float e = exponential(v[i.value] - shift[t.value]);
          out[i.value] = e * factor - target.base(k + i.value) * share;
          if (target.names(k + i.value)) {
            out[i.value] = static_cast<float>(c[t.value] * static_cast<double>(e) - q[t.value] * target.at(k + i.value));
          }
        });
        gpu::store_vec(d + k, out);
      }
    });
  }
}

inline constexpr int kReduceThreads = 256;

// The sum of a double of every thread of a block, to all of them; `shared` has room for one of each warp.
TORCHLIN_INLINE double add_block(double v, gpu::shared_ptr<double> shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  v = add_warp(v);
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < kReduceThreads / kWarp; ++w) v += shared[w];
  return v;
}

// One block: *scale = 1 / the number of samples that count.
__global__ void linearity_count(Job job, double* scale) {
  double count = 0;
  for (int64_t i = threadIdx.x; i < job.samples; i += kReduceThreads) {
    count += job.labels[i] != job.ignore_index && (job.others == nullptr || job.others[i] != job.ignore_index) ? 1.0 : 0.0;
  }
  count = add_block(count, gpu::dynamic_shared<double>());
  if (threadIdx.x == 0) *scale = 1.0 / count;
}

// One block: the reduced value. The mean of nothing is 0 times infinity.
__global__ void linearity_reduce(Job job, float* value) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < job.samples; i += kReduceThreads) sum += job.penalties[i];
  sum = add_block(sum, gpu::dynamic_shared<double>());
  if (threadIdx.x == 0) *value = static_cast<float>(sum * (job.scale_at == nullptr ? job.scale : *job.scale_at));
}

__global__ void linearity_copy(Job job, float* values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < job.samples) values[i] = static_cast<float>(job.penalties[i]);
}

// Rows times one factor each, in place; what is multiplied by 1 is left alone.
__global__ void linearity_scale(float* rows, int64_t width, const float* factor, int64_t step, int64_t samples) {
  const float by = factor[blockIdx.x % samples * step];
  if (by == 1.0f) return;
  float* row = rows + static_cast<int64_t>(blockIdx.x) * width;
  for (int64_t k = threadIdx.x; k < width; k += blockDim.x) row[k] *= by;
}

}  // namespace torchlin::linearity
