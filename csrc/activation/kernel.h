// What the kernels of activations and their callers agree on; no torch.
//
// A functor that catalogue/cpp_code.py wrote becomes a shared library that `_activation_load` takes by a source file like this,
// compiled with -shared -fPIC -std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast and csrc as include folder:
//
//   #include "activation/kernel.h"
//   #define TORCHLIN_SHARD_FILE "functor.inc"
//   #define TORCHLIN_KERNEL "activation/kernel_cpu.h"
//   #include "simd/foreach_isa.h"
//   TORCHLIN_ACTIVATION_LIBRARY
#pragma once

#include <cstdint>
#include <iterator>

namespace torchlin::activation {

// Whole vectors of contiguous data. Row r of the slots has element i's value at slots[r * slots_ld + i * slots_step]: step 0
// is one value for all elements, stored as a vector of equal lanes; step 1 is one value an element. Slot gradients are added
// to slot_grads, which has a layout of the same kind of its own.
struct Args {
  int64_t n = 0;  // elements, a multiple of the lanes
  const void* inputs[3] = {};
  const void* grad = nullptr;
  void* outputs[3] = {};  // of the backward: gradients by the inputs, null where not wanted
  const void* slots = nullptr;
  void* slot_grads = nullptr;
  int64_t slots_ld = 0, slots_step = 0, slot_grads_ld = 0, slot_grads_step = 0;
  const int64_t* first_row = nullptr;  // of each slot
  const int64_t* lengths = nullptr;    // rows of each slot: 1, or those of a coefficient vector
  bool stream = false;                 // the forward's output goes past the caches; it is aligned to 64 bytes then
};
using Kernel = void (*)(const Args&);

// A functor at one level. Types are numbered as `Storage`; a null pointer is a type that has no kernel of its own.
enum Storage : int { kFloat, kDouble, kHalf, kBFloat16, kStorages };
struct Functions {
  Kernel forward[kStorages], backward[kStorages];
  Kernel backward_slots[kStorages];  // gradients by inputs and by slots
};

struct Functor {
  int32_t id, inputs, slots;
  uint32_t vectors;  // bit i: slot i is a coefficient vector
};
constexpr int kLevels = 3;

// The functors of one translation unit, and their functions by level and functor; null is a level that was not compiled.
struct Table {
  int32_t abi, args_size;
  int32_t count;
  const Functor* functors;
  const Functions* levels[kLevels];
};
constexpr int32_t kAbi = 1;
constexpr char kLibrarySymbol[] = "torchlin_activation_table";

}  // namespace torchlin::activation

#if defined(__x86_64__)
#define TORCHLIN_ACTIVATION_LEVELS {baseline::kFunctions, avx2::kFunctions, avx512::kFunctions}
#else
#define TORCHLIN_ACTIVATION_LEVELS {baseline::kFunctions, nullptr, nullptr}
#endif
#define TORCHLIN_ACTIVATION_TABLE                                                                              \
  {kAbi, static_cast<int32_t>(sizeof(Args)), static_cast<int32_t>(std::size(baseline::kFunctions)), baseline::kFunctors, \
   TORCHLIN_ACTIVATION_LEVELS}
#define TORCHLIN_ACTIVATION_LIBRARY                                                   \
  namespace torchlin::activation {                                                    \
  extern "C" __attribute__((visibility("default"))) const Table torchlin_activation_table; \
  const Table torchlin_activation_table TORCHLIN_ACTIVATION_TABLE;                    \
  }
