// The functors that this process has kernels for, by id: those of the library, and those loaded at run time.
#pragma once

#include <string>
#include <vector>

#include "activation/kernel.h"

namespace torchlin::activation {

struct Entry {
  Functor functor;
  const Functions* levels[kLevels];  // null: not compiled for this level
};

// Null if there is none.
const Entry* find(int64_t id);

// Adds the functors of a shared library (kernel.h says how one is made); their ids, or what is wrong with it.
std::vector<int64_t> load(const std::string& path, std::string& problem);

}  // namespace torchlin::activation
