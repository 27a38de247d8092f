// The CUDA kernels of sample_triplet on the emulator, launched by the code that launches them on a device. Tensors come as
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "triplet/launch.h"

namespace py = pybind11;
namespace tl = torchlin::triplet;

namespace {

struct Call {
  tl::Job job{};
  int64_t seed = 0;
  double eps = 0;
  std::vector<int64_t> lengths;
};

// dims: (size, step in the row-major index) of a sample's dimensions in memory, outermost first; none if that is row-major.
Call make(int64_t batch, int64_t size, uintptr_t x, int64_t x_step, uintptr_t out, uintptr_t grad, double eps, uintptr_t eps_at,
          int64_t eps_step, int64_t run, const std::vector<std::pair<int64_t, int64_t>>& dims, int64_t seed, bool ball,
          std::optional<double> low, std::optional<double> high) {
  Call call;
  tl::Job& job = call.job;
  job.batch = batch, job.size = size;
  job.x = reinterpret_cast<const void*>(x), job.x_step = x_step;
  job.out = reinterpret_cast<void*>(out), job.grad = reinterpret_cast<const void*>(grad);
  job.eps = reinterpret_cast<const void*>(eps_at), job.eps_step = eps_step, job.run = run;
  job.clip = low.has_value(), job.ball = ball;
  job.low = low.value_or(-std::numeric_limits<double>::infinity());
  job.high = high.value_or(std::numeric_limits<double>::infinity());
  for (const auto& [length, step] : dims) job.dims[job.ndim++] = {length, step};
  call.seed = seed, call.eps = eps;
  return call;
}

constexpr auto kLaunch = [](auto kernel, unsigned grid, int threads, size_t bytes, const auto&... args) {
  simt::launch(kernel, simt::dim3(grid), simt::dim3(static_cast<unsigned>(threads)), bytes, args...);
};

template <class T>
const int64_t* measure(Call& call) {
  if (!call.job.ball || call.job.size == 0) return nullptr;
  call.job.bits = tl::length_bits(call.job.size, std::is_same_v<T, double>);
  call.lengths.assign(static_cast<size_t>(2 * call.job.batch), 0);
  tl::launch_lengths<tl::compute_t<T>>(call.job, &call.seed, reinterpret_cast<unsigned long long*>(call.lengths.data()), kLaunch);
  return call.lengths.data();
}

template <class T>
void forward(Call& call, uintptr_t mix) {
  const int64_t* lengths = measure<T>(call);
  tl::launch_forward<T>(call.job, &call.seed, lengths, call.eps, reinterpret_cast<void*>(mix), kLaunch);
}

template <class T>
void backward(Call& call) {
  const int64_t* lengths = measure<T>(call);
  tl::launch_backward<T>(call.job, &call.seed, lengths, call.eps, kLaunch);
}

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("forward_" + dtype).c_str(), &forward<T>);
  m.def(("backward_" + dtype).c_str(), &backward<T>);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Call>(m, "Call");
  m.def("make", &make);
  m.def("set_seed", [](uint64_t seed) { simt::set_seed(seed); });
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<torchlin::gpu::Half>(m, "float16");
  bind<torchlin::gpu::BFloat16>(m, "bfloat16");
  py::register_exception<simt::Error>(m, "Error");
}
