// One call of a kernel over strided operands: dimensions are merged, long inner runs go to the kernel as they lie in memory,
// everything else (strides, ends of runs, types that the kernel has no code for) through blocks in the first cache.
#pragma once

#include <cstdint>
#include <vector>

#include "activation/kernel.h"

namespace torchlin::activation {

// Dense blocks of the compute type, from and to data of a storage type; steps in elements.
struct Copies {
  void (*gather)(const void* source, int64_t step, int64_t n, void* target);
  void (*scatter)(const void* source, int64_t step, int64_t n, void* target);
};

// The channel is an operand too: an index into the slots' rows.
enum Operand : int { kInput = 0, kGrad = 3, kOutput = 4, kChannel = 7, kOperands = 8 };

struct Dim {
  int64_t size;
  int64_t step[kOperands];  // in elements
};

struct Loop {
  Kernel kernel = nullptr;         // of the compute type
  Kernel direct_kernel = nullptr;  // of a 16-bit storage type, if there is one
  const Copies* copies = nullptr;  // by storage type
  Storage storage = kFloat;
  int64_t lanes = 1;
  bool stream = false;  // long runs of the output go past the caches

  int operands[kOperands], count = 0;  // those in use, without the channel
  char* base[kOperands] = {};
  int ndim = 0;
  Dim dims[64];
  int64_t numel = 1;

  const char* slots = nullptr;  // (rows, channels), of the compute type
  int64_t rows = 0, channels = 1;
  const int64_t* first_row = nullptr;
  const int64_t* lengths = nullptr;

  void use(int operand, void* data) {
    operands[count++] = operand;
    base[operand] = static_cast<char*>(data);
  }
  int64_t element_size() const { return storage == kDouble ? 8 : storage == kFloat ? 4 : 2; }
  int64_t compute_size() const { return storage == kDouble ? 8 : 4; }

  // Dimensions come as the tensors have them; they leave sorted by the steps of `lead`, innermost first, and merged.
  void add_dim(const Dim& dim) {
    numel *= dim.size;
    if (dim.size != 1) dims[ndim++] = dim;
  }
  void merge(int lead);

  // Elements [begin, end) in that order. Slot gradients are added to sums: (rows, channels).
  void run(int64_t begin, int64_t end, double* sums) const;
};

}  // namespace torchlin::activation
