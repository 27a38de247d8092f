// The CUDA Hadamard kernels on the emulator, planned by the code that plans them for a device; bound to
// numpy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "hadamard/launch.h"

namespace py = pybind11;
namespace tl = torchlin::hadamard;

namespace {

tl::Type type_of(const std::string& name) {
  if (name == "float32") return tl::Type::f32;
  if (name == "float64") return tl::Type::f64;
  if (name == "float16") return tl::Type::f16;
  if (name == "bfloat16") return tl::Type::bf16;
  throw std::invalid_argument("type: " + name);
}

template <class T>
void run(const tl::Plan& plan, const tl::Pointers& at) {
  tl::run_plan<T>(plan, at, [](auto kernel, unsigned grid, int threads, size_t bytes, const auto&... args) {
    simt::launch(kernel, simt::dim3(grid), simt::dim3(static_cast<unsigned>(threads)), bytes, args...);
  });
}

// x and y are raw bytes; the tensors begin `x_offset`, `y_offset` elements into them. Returns what was
// launched.
py::list transform(const std::string& type, py::array x, int64_t x_offset, py::array y, int64_t y_offset,
                   std::vector<int64_t> sizes, std::vector<int64_t> x_strides, std::vector<int64_t> y_strides,
                   int dim, int64_t order, std::optional<py::array_t<int8_t>> had,
                   std::optional<py::array> signs, double scale, bool transpose, uint64_t seed,
                   int multiprocessors, size_t shared_per_block) {
  tl::Transform t{};
  t.type = type_of(type);
  t.sizes = sizes, t.x_strides = x_strides, t.y_strides = y_strides;
  t.dim = dim, t.order = order, t.K = had ? had->shape(0) : 1;
  auto* xp = static_cast<char*>(x.mutable_data()) + x_offset * static_cast<int64_t>(tl::size_of(t.type));
  auto* yp = static_cast<char*>(y.mutable_data()) + y_offset * static_cast<int64_t>(tl::size_of(t.type));
  t.x = reinterpret_cast<uintptr_t>(xp), t.y = reinterpret_cast<uintptr_t>(yp);
  t.signs = signs ? reinterpret_cast<uintptr_t>(signs->data()) : 0;
  t.transpose = transpose;
  const tl::Plan plan = tl::make_plan(t, tl::Device{multiprocessors, shared_per_block});
  std::vector<float> workspace(static_cast<size_t>(plan.workspace_elements), std::nanf(""));
  const tl::Pointers at{
      xp, yp, workspace.data(), signs ? signs->data() : nullptr, had ? had->data() : nullptr, scale};
  simt::set_seed(seed);
  simt::limits().shared_bytes = shared_per_block;
  switch (t.type) {
    case tl::Type::f32: run<float>(plan, at); break;
    case tl::Type::f64: run<double>(plan, at); break;
    case tl::Type::f16: run<torchlin::gpu::Half>(plan, at); break;
    case tl::Type::bf16: run<torchlin::gpu::BFloat16>(plan, at); break;
  }
  py::list steps;
  for (const tl::Step& s : plan.steps) {
    py::dict d;
    d["kernel"] = s.by_rows ? "rows" : "tile";
    d["mma"] = s.mma;
    d["prefetch"] = s.prefetch;
    d["grid"] = s.grid;
    d["threads"] = s.threads;
    d["shared_bytes"] = s.shared_bytes;
    d["x_vector"] = s.by_rows ? s.rows.x_vector : s.tile.op.x_vector;
    d["y_vector"] = s.by_rows ? s.rows.y_vector : s.tile.op.y_vector;
    d["log_rows"] = s.by_rows ? 0 : s.tile.log_rows;
    d["log_columns"] = s.by_rows ? 0 : s.tile.log_columns;
    steps.append(d);
  }
  return steps;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("transform", &transform, py::arg("type"), py::arg("x"), py::arg("x_offset"), py::arg("y"),
        py::arg("y_offset"), py::arg("sizes"), py::arg("x_strides"), py::arg("y_strides"), py::arg("dim"),
        py::arg("order"), py::arg("had"), py::arg("signs"), py::arg("scale"), py::arg("transpose"),
        py::arg("seed"), py::arg("multiprocessors"), py::arg("shared_per_block"));
  py::register_exception<simt::Error>(m, "Error");
}
