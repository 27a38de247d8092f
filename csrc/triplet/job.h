// One call of sample_triplet, as kernels see it: pointers, sizes, and what the random numbers are made of.
//
// A number depends on the seed and on its place in a row-major sample only. The counter of Philox is {element (64 bits), pair of
// samples, purpose}: its four words are the noise of x_a and x_b in the samples 2p and 2p + 1. With another purpose the place of
// the pair is taken by nothing, that of the element by the sample: mix, and the radii of x_a and x_b in the l2 ball.
#pragma once

#include <cmath>
#include <cstdint>

#include "triplet/normal.h"
#include "triplet/philox.h"

namespace torchlin::triplet {

inline constexpr int kDims = 64;
inline constexpr int64_t kChunk = 1024;  // elements of a sample: a page of float

enum Purpose : uint32_t { kNoise = 0, kSample = 1 };

struct Dim {
  int64_t size, step;  // step: in the row-major index
};

struct Job {
  int64_t batch, size;  // samples, elements of one
  const void* x;
  int64_t x_step;  // elements between samples; within them x is dense
  void* out;       // (3, batch, size): all x_a, all x_b, all x_c
  const void* eps;
  int64_t eps_step, run;  // between samples; elements, in memory order, that share one
  bool clip, ball;        // ball: l2
  double low, high;
  Keys keys;
  const void* mix;        // (batch), of the compute type
  const double* radius;   // (2, batch): what the normal numbers of x_a and x_b are multiplied with in the ball
  const void* grad;       // of the backward: as out is of the forward, while there out is dx (batch, size)
  int bits;               // of the lengths' fractions
  int ndim;               // of a sample whose memory is not in row-major order: outermost first; 0 otherwise
  Dim dims[kDims];

  int64_t pairs() const { return (batch + 1) / 2; }
  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
};

// Units are chunks of pairs of samples.
struct Kernel {
  void (*forward[2])(const Job& job, int64_t begin, int64_t end);  // without and with clip
  void (*backward)(const Job& job, int64_t begin, int64_t end);
  void (*lengths)(const Job& job, int64_t begin, int64_t end, int64_t* sums);
};

// The odd 23-bit fractions k / 2^24: unbiased, never 0 or 1, and 1 - mix is exact in float.
TORCHLIN_HOST_DEVICE inline float mix_of(uint32_t word) { return static_cast<float>((word >> 9) * 2 + 1) * 0x1p-24f; }

// Bits behind the point of squared lengths. Floats of long vectors: as many as a word has room for. Otherwise as many as the sum
// has: an element's square is below 46, and many of them together never are four times their mean.
inline int length_bits(int64_t size, bool wide) {
  if (size >= 4096 && !wide) return 24;
  int bits = size < 64 ? 56 : 60;
  for (; size > 1; size = (size + 1) / 2) --bits;
  return bits;
}

// A uniform point of the unit ball is a normal vector over its length, times u^(1/size).
TORCHLIN_HOST_DEVICE inline double radius_of(int64_t length, int bits, uint32_t word, int64_t size) {
  if (length == 0) return 0;
  const double u = static_cast<double>(word >> 1 | 1) * 0x1p-31, unit = 1 / static_cast<double>(int64_t{1} << bits);
  return pow(u, 1 / static_cast<double>(size)) / sqrt(static_cast<double>(length) * unit);
}

}  // namespace torchlin::triplet
