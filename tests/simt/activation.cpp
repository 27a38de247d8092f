// The CUDA kernels of activations on the emulator, planned by the code that plans them for a device; bound to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_map>

#include "activation/kernels.inc"
#include "activation/launch.h"

namespace py = pybind11;
namespace ta = torchlin::activation;

namespace torchlin::activation {
#define DECLARE(shard) extern const Table shard;
TORCHLIN_SHARDS(DECLARE)
#undef DECLARE
}  // namespace torchlin::activation

namespace {

const ta::Functor& functor_of(int64_t id) {
  static const auto all = [] {
    std::unordered_map<int64_t, const ta::Functor*> table;
#define ADD(shard) \
  for (int i = 0; i < ta::shard.count; ++i) table.emplace(ta::shard.functors[i].id, &ta::shard.functors[i]);
    TORCHLIN_SHARDS(ADD)
#undef ADD
    return table;
  }();
  return *all.at(id);
}

// An address and strides; the address 0 for what is not there.
using Strides = std::vector<int64_t>;
using Tensor = std::pair<uintptr_t, Strides>;

py::list run(int64_t kernel, int type, Strides sizes, bool gradient, std::vector<Tensor> in, Tensor grad,
             std::vector<Tensor> out, int64_t split, int64_t split_dim, uintptr_t slots, int64_t channels, int64_t channel_dim,
             Strides lengths, uintptr_t slot_grads, uint64_t seed, size_t shared_per_block, int64_t limit) {
  const ta::Functor& functor = functor_of(kernel);
  const auto view = [](const Tensor& t) { return ta::View{reinterpret_cast<char*>(t.first), t.second.data()}; };
  ta::Call call{};
  call.type = static_cast<ta::Type>(type);
  call.inputs = functor.inputs, call.slots = functor.slots;
  call.sizes = sizes, call.gradient = gradient;
  for (size_t i = 0; i < in.size(); ++i) call.in[i] = view(in[i]);
  call.grad = view(grad);
  for (size_t i = 0; i < out.size(); ++i) call.out[i] = view(out[i]);
  call.split = split, call.split_dim = split_dim;
  call.slot_values = reinterpret_cast<const float*>(slots);
  call.channels = channels, call.channel_dim = channel_dim, call.lengths = lengths;
  call.slot_grads = reinterpret_cast<float*>(slot_grads);
  const ta::Plan plan = ta::make_plan(call, shared_per_block, limit);
  // As the device finds it: with nothing written, but where op.cu clears it.
  std::vector<double> sums(static_cast<size_t>(plan.sums), plan.launches.size() > 1 ? 0.0 : std::nan(""));
  simt::set_seed(seed);
  simt::limits().shared_bytes = shared_per_block;
  ta::run_plan(plan, functor, gradient, sums.data(), [](auto k, unsigned x, unsigned y, size_t bytes, const auto& arguments) {
    simt::launch(k, simt::dim3(x, y), simt::dim3(ta::kThreads), bytes, arguments);
  });
  py::list launches;
  for (const ta::Launch& l : plan.launches) {
    py::dict d;
    d["vectors"] = l.arguments.of.vectors;
    d["interleaved"] = l.arguments.of.interleaved;
    d["ndim"] = l.arguments.of.ndim;
    d["by_columns"] = l.arguments.by_columns;
    d["window"] = l.arguments.window;
    d["grid"] = py::make_tuple(l.grid_x, l.grid_y);
    launches.append(d);
  }
  return launches;
}

// Value and derivative of an elementary function at n points.
void elementary(const std::string& name, uintptr_t x, int64_t n, uintptr_t value, uintptr_t derivative) {
  const auto each = [&](auto pair) {
    for (int64_t i = 0; i < n; ++i) {
      const auto r = pair(reinterpret_cast<const float*>(x)[i]);
      reinterpret_cast<float*>(value)[i] = r.v, reinterpret_cast<float*>(derivative)[i] = r.d;
    }
  };
#define FUNCTION(f) \
  if (name == #f) return each([](float u) { return ta::tl::f##_pair(u); });
  TORCHLIN_UNARY_NAMES(FUNCTION)
#undef FUNCTION
  throw std::invalid_argument(name);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("run", &run, py::arg("kernel"), py::arg("type"), py::arg("sizes"), py::arg("gradient"), py::arg("inputs"),
        py::arg("grad"), py::arg("outputs"), py::arg("split"), py::arg("split_dim"), py::arg("slots"), py::arg("channels"),
        py::arg("channel_dim"), py::arg("lengths"), py::arg("slot_grads"), py::arg("seed"), py::arg("shared_per_block"),
        py::arg("limit"));
  m.def("elementary", &elementary);
  py::register_exception<simt::Error>(m, "Error");
}
