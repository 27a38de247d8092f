// The CUDA kernels of mixup and cutmix on the emulator, launched by the code that launches them on a device. Tensors come as
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "mixup/launch.h"

namespace py = pybind11;
namespace tl = torchlin::mixup;

namespace {

constexpr auto kLaunch = [](auto kernel, unsigned grid, int threads, size_t bytes, const auto&... args) {
  simt::launch(kernel, simt::dim3(grid), simt::dim3(static_cast<unsigned>(threads)), bytes, args...);
};

template <class P>
P at(uintptr_t address) {
  return reinterpret_cast<P>(address);
}

struct Lists {
  std::vector<int64_t> head, next;
  template <class Job>
  explicit Lists(Job& job) : head(static_cast<size_t>(job.batch), -7), next(static_cast<size_t>(job.batch), -7) {
    tl::launch_link(job.partner, job.batch, head.data(), next.data(), kLaunch);
    job.head = head.data(), job.next = next.data();
  }
};

tl::Mix mix_of(std::tuple<int64_t, int64_t, int64_t> geometry, uintptr_t x, uintptr_t out, uintptr_t perm) {
  tl::Mix mix{};
  std::tie(mix.outer, mix.batch, mix.inner) = geometry;
  mix.x = at<const void*>(x), mix.out = at<void*>(out), mix.partner = at<const int64_t*>(perm);
  return mix;
}

template <class T>
void mixup(std::tuple<int64_t, int64_t, int64_t> geometry, uintptr_t x, uintptr_t out, uintptr_t perm, double lam, uintptr_t lams,
           bool backward) {
  tl::Mix mix = mix_of(geometry, x, out, perm);
  if (!backward) {
    tl::launch_forward<T>(mix, lam, at<const void*>(lams), kLaunch);
    return;
  }
  const Lists lists(mix);
  tl::launch_backward<T>(mix, lam, at<const void*>(lams), kLaunch);
}

template <class T>
void lam_backward(std::tuple<int64_t, int64_t, int64_t> geometry, uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t perm) {
  tl::Mix mix = mix_of(geometry, grad, 0, perm);
  mix.other = at<const void*>(x);
  std::vector<double> sums(static_cast<size_t>(mix.batch * tl::lam_parts_of(mix)));
  tl::launch_lam_backward<T>(mix, sums.data(), at<void*>(out), kLaunch);
}

// image: planes, height, between, width, depth
template <class T>
void cutmix(int64_t batch, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> image, uintptr_t x, uintptr_t out, uintptr_t perm,
            uintptr_t boxes, int64_t box_step, bool backward) {
  tl::Cut cut{};
  cut.batch = batch;
  std::tie(cut.planes, cut.height, cut.between, cut.width, cut.depth) = image;
  cut.x = at<const void*>(x), cut.out = at<void*>(out);
  cut.partner = at<const int64_t*>(perm), cut.boxes = at<const int64_t*>(boxes), cut.box_step = box_step;
  if (!backward) {
    tl::launch_cut<T>(cut, false, kLaunch);
    return;
  }
  const Lists lists(cut);
  tl::launch_cut<T>(cut, true, kLaunch);
}

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("mixup_" + dtype).c_str(), &mixup<T>);
  m.def(("lam_backward_" + dtype).c_str(), &lam_backward<T>);
  m.def(("cutmix_" + dtype).c_str(), &cutmix<T>);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<torchlin::gpu::Half>(m, "float16");
  bind<torchlin::gpu::BFloat16>(m, "bfloat16");
  py::register_exception<simt::Error>(m, "Error");
}
