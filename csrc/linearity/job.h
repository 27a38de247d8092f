// One call of the three-point loss, as the kernels of every device see it: pointers, sizes, no torch.
#pragma once

#include <cstdint>

#include "core/scratch.h"

namespace torchlin::linearity {

enum class Penalty : int { square, huber, abs };

// What is left of the target distribution T of a sample when the classes that labels name are taken out.
enum class Base : int { none, constant, row };

// Rows of logits are `classes` contiguous elements; everything that has one element a sample is contiguous or, of step 0, one
// element for all. Element types are the logits'.
struct Job {
  int64_t samples, classes;
  const void* logits[3];  // at x_a, x_b and x_c = (1 - mix) x_a + mix x_b
  int64_t row_step[3];
  const void* mix;
  int64_t mix_step;

  const int64_t* labels;  // or null, where `dense` is given
  const int64_t* others;  // null, or second labels, of share 1 - lam
  const void* lam;
  int64_t lam_step;
  const void* dense;  // probabilities, rows of `classes`
  const void* weight;  // null, or one a class
  double smoothing;
  int64_t ignore_index;

  Penalty penalty;
  double beta;
  double scale;  // of every penalty in the reduced value
  const double* scale_at;  // null, or where a device has put it

  const void* grad_value;  // null: 1
  int64_t grad_value_step;
  const void* grad_losses;  // null: 0, else (3, samples)

  // Each may be null: it is not wanted then.
  double* penalties;  // one a sample
  void* losses;       // (3, samples)
  void* dlogits;      // (3 samples, classes)
  void* dmix;         // one a sample
};

enum class Purpose : int { kTarget, kCount };
using Scratch = ScratchOf<Purpose>;

struct Kernel {
  // Samples begin ... end - 1.
  void (*run)(const Job& job, int64_t begin, int64_t end);
  // Rows of `width` elements times one factor each: row r of `rows` times factor[(r mod samples) step].
  void (*scale)(void* rows, int64_t width, const void* factor, int64_t step, int64_t samples, int64_t begin, int64_t end);
};

}  // namespace torchlin::linearity
