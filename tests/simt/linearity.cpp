// The CUDA kernels of the three-point loss on the emulator, launched by the code that launches them on a device. Tensors come
// as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "linearity/launch.h"

namespace py = pybind11;
namespace tl = torchlin::linearity;

namespace {

constexpr auto kLaunch = [](auto kernel, unsigned grid, int threads, size_t bytes, const auto&... arguments) {
  simt::launch(kernel, simt::dim3(grid), simt::dim3(static_cast<unsigned>(threads)), bytes, arguments...);
};

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The reduction is Python's number for it.
void run(const tl::Job& job, int reduction, uintptr_t value, uint64_t seed) {
  simt::set_seed(seed);
  std::vector<double> scratch(static_cast<size_t>(job.samples) + 1);
  tl::run(job, reduction == 1, reduction != 0, at<float>(value), scratch.data(), kLaunch);
}

void scale(uintptr_t rows, int64_t width, uintptr_t factor, int64_t step, int64_t samples, uint64_t seed) {
  simt::set_seed(seed);
  tl::run_scale(at<float>(rows), width, at<const float>(factor), step, samples, kLaunch);
}

tl::Job make(int64_t samples, int64_t classes, const std::vector<uintptr_t>& logits, const std::vector<int64_t>& row_steps,
             const std::vector<uintptr_t>& labels, uintptr_t lam, int64_t lam_step, uintptr_t dense, uintptr_t mix,
             int64_t mix_step, uintptr_t weight, double smoothing, int64_t ignore_index, int penalty, double beta) {
  tl::Job job{};
  job.samples = samples, job.classes = classes;
  for (int t = 0; t < 3; ++t) job.logits[t] = at(logits[t]), job.row_step[t] = row_steps[t];
  job.labels = at<const int64_t>(labels[0]), job.others = at<const int64_t>(labels[1]);
  job.lam = at(lam), job.lam_step = lam_step, job.dense = at(dense);
  job.mix = at(mix), job.mix_step = mix_step, job.weight = at(weight);
  job.smoothing = smoothing, job.ignore_index = ignore_index;
  job.penalty = static_cast<tl::Penalty>(penalty), job.beta = beta;
  return job;
}

void set_outputs(tl::Job& job, uintptr_t losses, uintptr_t dlogits, uintptr_t dmix) {
  job.losses = at(losses), job.dlogits = at(dlogits), job.dmix = at(dmix);
}

void set_gradients(tl::Job& job, uintptr_t grad_value, int64_t step, uintptr_t grad_losses) {
  job.grad_value = at(grad_value), job.grad_value_step = step, job.grad_losses = at(grad_losses);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<tl::Job>(m, "Job").def(py::init(&make)).def("outputs", &set_outputs).def("gradients", &set_gradients);
  m.def("run", &run);
  m.def("scale", &scale);
  py::register_exception<simt::Error>(m, "Error");
}
