// mixup and cutmix as kernels see them: pointers and sizes.
//
// All tensors of a call are dense in one layout, in which the samples lie as [outer][batch][inner]: neighbours of a sample are
// inner together. Who is mixed into whom is a list: of the samples i with partner[i] = j, head[j] is the first and next[i] the one
// after i, in rising order, so that sums over them have one order; -1 ends it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCHLIN_HOST_DEVICE __host__ __device__
#else
#define TORCHLIN_HOST_DEVICE
#endif

namespace torchlin::mixup {

struct Mix {
  int64_t outer, batch, inner;
  const void* x;        // of the backward: the output's gradient
  const void* other;    // of the gradient to lam: x, where x is the output's gradient
  void* out;
  const void* lam;      // (batch) with step 1, or one with step 0; of the compute type
  const void* rest;     // 1 - lam
  int64_t lam_step;
  const int64_t *partner, *head, *next;

  TORCHLIN_HOST_DEVICE int64_t row(int64_t o, int64_t sample) const { return (o * batch + sample) * inner; }
};

// A sample in memory is [planes][height][between][width][depth].
struct Cut {
  int64_t batch, planes, height, between, width, depth;
  const void* x;
  void* out;
  const int64_t* boxes;  // (batch, 4) with step 4, or one with step 0: top, bottom, left, right
  int64_t box_step;
  const int64_t *partner, *head, *next;

  TORCHLIN_HOST_DEVICE int64_t row() const { return width * depth; }
  TORCHLIN_HOST_DEVICE int64_t plane() const { return height * between * row(); }
  TORCHLIN_HOST_DEVICE int64_t sample() const { return planes * plane(); }
};

struct Kernel {
  // Positions [begin, end) of inner, in one of outer, of the samples [first, last).
  void (*forward)(const Mix& mix, int64_t o, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*backward)(const Mix& mix, int64_t o, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*lam_backward)(const Mix& mix, int64_t o, int64_t begin, int64_t end, double* sums);  // adds to (batch)
  void (*cut_backward)(const Cut& cut, int64_t sample, int64_t plane, void* row);  // room for a row of the compute type
};

}  // namespace torchlin::mixup
