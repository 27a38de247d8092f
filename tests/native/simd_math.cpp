// csrc/simd's functions and the catalogue's functors at every CPU level, over numpy arrays, for test_simd_math.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace tests {

// A call: outputs f and, variable after variable, d of n points. Slots hold values[offset[i] .. + size[i]).
struct Call {
  int id;
  const void* const* x;
  int64_t n;
  const void* values;
  const int* offset;
  const int* size;
  void* f;
  void* d;
};

struct Function {
  void (*run)(const Call&) = nullptr;
  int variables = 0;
};

}  // namespace tests

#define TORCHLIN_KERNEL "simd_math_kernel.h"
#include "simd/foreach_isa.h"

namespace py = pybind11;

namespace {

bool supported(const std::string& level) {
#if defined(__x86_64__)
  if (level == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == "baseline";
}

template <class C>
tests::Function find(const std::string& level, const std::string& name) {
#if defined(__x86_64__)
  if (level == "avx2") return torchlin::avx2::find<C>(name);
  if (level == "avx512") return torchlin::avx512::find<C>(name);
#endif
  return torchlin::baseline::find<C>(name);
}

// Values of function `name` and its derivatives: n of them by one variable, otherwise [variables, n].
template <class C>
py::tuple run(const std::string& level, const std::string& name, const std::vector<py::array_t<C>>& inputs,
              const std::vector<C>& values, const std::vector<int>& offset, const std::vector<int>& size) {
  const tests::Function function = supported(level) ? find<C>(level, name) : tests::Function{};
  if (function.run == nullptr) throw std::invalid_argument("no " + name + " at " + level);
  const py::ssize_t n = inputs.at(0).size();
  using Shape = std::vector<py::ssize_t>;
  py::array_t<C> f(n), d(function.variables == 1 ? Shape{n} : Shape{function.variables, n});
  const void* x[3] = {};
  for (size_t i = 0; i < inputs.size() && i < 3; ++i) x[i] = inputs[i].data();
  function.run({0, x, n, values.data(), offset.data(), size.data(), f.mutable_data(), d.mutable_data()});
  return py::make_tuple(f, d);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("run_float", run<float>);
  m.def("run_double", run<double>);
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const char* level : {"baseline", "avx2", "avx512"}) {
      if (supported(level)) names.push_back(level);
    }
    return names;
  });
}
