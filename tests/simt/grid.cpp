// The CUDA kernels of the grid family on the emulator, planned by the code that plans them for a device; bound to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "grid/launch.h"

namespace py = pybind11;
namespace tg = torchlin::grid;

namespace {

const auto launcher = [](auto kernel, unsigned x, unsigned y, int threads, size_t shared_bytes, const auto& arguments) {
  simt::launch(kernel, simt::dim3(x, y), simt::dim3(static_cast<unsigned>(threads)), shared_bytes, arguments);
};

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void set_up(uint64_t seed, size_t shared_per_block) {
  simt::set_seed(seed);
  simt::limits().shared_bytes = shared_per_block;
}

void encode(uintptr_t x, uintptr_t grid, uintptr_t codes, int64_t rows, int64_t k, int n, int p, uint64_t seed) {
  set_up(seed, 48 << 10);
  tg::Encode a{};
  a.x = at<float>(x), a.grid = at<float>(grid), a.codes = at(codes), a.rows = rows, a.k = k, a.n = n, a.p = p;
  tg::run_encode(a, launcher);
}

void decode(uintptr_t codes, uintptr_t grid, uintptr_t out, int64_t count, int n, int p, uint64_t seed) {
  set_up(seed, 0);
  tg::run_decode({at(codes), at<float>(grid), at<float>(out), count, n, p}, launcher);
}

void pack(uintptr_t codes, uintptr_t packed, int64_t rows, int64_t count, int64_t n, uint64_t seed) {
  set_up(seed, 0);
  tg::run_pack(tg::pack_of(at(codes), at(packed), rows, count, n), launcher);
}

void unpack(uintptr_t packed, uintptr_t codes, int64_t rows, int64_t count, int64_t n, uint64_t seed) {
  set_up(seed, 0);
  tg::run_unpack(tg::pack_of(at(codes), at(packed), rows, count, n), launcher);
}

tg::Weight weight(uintptr_t packed, uintptr_t scales, bool half_scales, uintptr_t grid, int64_t n, int64_t p,
                  int64_t out_features, int64_t in_features, int64_t block_size) {
  tg::Weight w{};
  w.packed = at(packed), w.scales = at(scales), w.grid = at<float>(grid), w.half_scales = half_scales;
  w.n = n, w.p = p, w.out_features = out_features, w.in_features = in_features, w.block_size = block_size;
  return w;
}

void dequantize(const tg::Weight& w, int64_t first, int64_t count, int type, uintptr_t out, uint64_t seed) {
  set_up(seed, 0);
  tg::run_dequantize(w, first, count, static_cast<tg::Type>(type), at(out), launcher);
}

tg::Plan plan_of(const tg::Weight& w, uintptr_t x, uintptr_t bias, uintptr_t y, int type, int64_t batch, int multiprocessors,
                 size_t shared_per_block) {
  const tg::Device device{multiprocessors, shared_per_block};
  return tg::Planner(w, at(x), at(bias), at(y), static_cast<tg::Type>(type), batch, device).take();
}

py::dict describe(const tg::Plan& plan) {
  static constexpr const char *kPaths[] = {"gemv", "mma", "dense"}, *kSources[] = {"wide", "shared", "global"},
                              *kTilings[] = {"narrow", "tall", "broad", "blocks"};
  py::dict d;
  d["path"] = kPaths[static_cast<int>(plan.path)];
  if (plan.path == tg::Path::dense) return d;
  const tg::Linear& a = plan.linear;
  d["source"] = kSources[static_cast<int>(plan.source)];
  d["tiling"] = plan.path == tg::Path::mma ? kTilings[static_cast<int>(plan.tiling)] : "";
  d["coordinates"] = plan.coordinates, d["columns"] = plan.columns, d["pad"] = plan.pad;
  d["grid"] = py::make_tuple(plan.grid_x, plan.grid_y), d["shared_bytes"] = plan.shared_bytes;
  d["codes"] = a.table.codes, d["entries"] = a.table.entries;
  d["stride"] = plan.source == tg::Source::global ? 0 : 1 << a.table.log_stride;
  d["digits"] = a.rows.digits, d["width"] = a.rows.width, d["words"] = a.rows.words;
  d["steps"] = a.steps, d["chunk"] = a.chunk, d["splits"] = a.splits, d["parts"] = a.parts, d["fine"] = a.fine;
  return d;
}

// What was planned; nothing is run of a dense plan.
py::dict linear(const tg::Weight& w, uintptr_t x, uintptr_t bias, uintptr_t y, int type, int64_t batch, int multiprocessors,
                size_t shared_per_block, uint64_t seed) {
  const tg::Plan plan = plan_of(w, x, bias, y, type, batch, multiprocessors, shared_per_block);
  set_up(seed, shared_per_block);
  std::vector<float> workspace(static_cast<size_t>(plan.workspace), std::nanf(""));
  if (plan.path != tg::Path::dense) tg::run_linear(plan, workspace.data(), launcher);
  return describe(plan);
}

// The plan for aligned tensors of these sizes, which need not exist.
py::dict plan(int64_t n, int64_t p, int64_t out_features, int64_t in_features, int64_t block_size, int type, int64_t batch,
              int multiprocessors, size_t shared_per_block) {
  const tg::Weight w = weight(256, 256, true, 256, n, p, out_features, in_features, block_size);
  return describe(plan_of(w, 256, 0, 256, type, batch, multiprocessors, shared_per_block));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<tg::Weight>(m, "Weight");
  m.def("weight", &weight);
  m.def("encode", &encode);
  m.def("decode", &decode);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("dequantize", &dequantize);
  m.def("linear", &linear);
  m.def("plan", &plan);
  m.def("layout", [](int64_t n) { return py::make_tuple(tg::layout_of(n).digits, tg::layout_of(n).width); });
  py::register_exception<simt::Error>(m, "Error");
}
