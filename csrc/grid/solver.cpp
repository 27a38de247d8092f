// Raw ops of the solvers that make grids (torchlin/quant/grid_solver.py). They serve no model, so there are none for CUDA.
#include <array>
#include <tuple>
#include <vector>

#include "core/op.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "grid/nearest.h"
#include "grid/solver_plane.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "grid/solver_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

using Search = void (*)(const grid::NearestIndex&, const float*, int64_t, int32_t*, float*);

Search search_of_level() {
#if defined(__x86_64__)
  static constexpr std::array<Search, kCpuIsaCount> kLevels{&baseline::nearest_samples, &avx2::nearest_samples,
                                                            &avx512::nearest_samples};
  return kLevels[static_cast<int>(cpu_isa())];
#else
  return &baseline::nearest_samples;
#endif
}

Tensor doubles(const Tensor& like, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(ScalarType::Double));
}

void check_plane(const Tensor& points) {
  TORCHLIN_CHECK(points.scalar_type() == ScalarType::Double && points.dim() == 2 && points.sizes()[1] == 2 && points.is_contiguous(),
                 "points: expected float64 (n, 2), contiguous");
}

void copy(const std::vector<double>& from, const Tensor& to) {
  std::copy(from.begin(), from.end(), static_cast<double*>(to.mutable_data_ptr()));
}

// Of each cell of a grid in the plane: its mass, the integral of z, its part of the squared error.
std::tuple<Tensor, Tensor, Tensor> plane_cells(const Tensor& points) {
  check_plane(points);
  const int64_t n = points.sizes()[0];
  grid::Cells cells;
  grid::PlaneSolver(n).evaluate(static_cast<const double*>(points.const_data_ptr()), cells);
  Tensor mass = doubles(points, {n}), moment = doubles(points, {n, 2}), energy = doubles(points, {n});
  copy(cells.mass, mass);
  copy(cells.moment, moment);
  copy(cells.energy, energy);
  return {mass, moment, energy};
}

// A stationary grid in the plane near the given one; with hops, the best that basin hopping finds.
Tensor plane_search(const Tensor& points, double tolerance, int64_t hops, int64_t seed) {
  check_plane(points);
  const int64_t n = points.sizes()[0];
  Tensor out = empty_like(points);
  double* moved = static_cast<double*>(out.mutable_data_ptr());
  std::copy_n(static_cast<const double*>(points.const_data_ptr()), 2 * n, moved);
  grid::PlaneSolver solver(n);
  solver.descend(moved, tolerance, 3000);
  if (hops > 0) solver.search(moved, hops, static_cast<uint64_t>(seed));
  return out;
}

// Of each cell, summed over the samples that it holds: their number, they themselves, their squared distances. The same sums
// whatever the number of threads.
std::tuple<Tensor, Tensor, Tensor> sample_cells(const Tensor& samples, const Tensor& points) {
  const bool fits = samples.scalar_type() == ScalarType::Float && points.scalar_type() == ScalarType::Float && samples.dim() == 2 &&
                    points.dim() == 2 && samples.sizes()[1] == points.sizes()[1] && samples.is_contiguous() && points.is_contiguous();
  TORCHLIN_CHECK(fits, "expected float32 samples (m, p) and points (n, p), contiguous");
  const int64_t m = samples.sizes()[0], n = points.sizes()[0], p = points.sizes()[1];
  TORCHLIN_CHECK(n >= 1 && n <= 65536 && p >= 1 && p <= grid::kMostCoordinates, n, " points of ", p, " coordinates");
  const float* z = static_cast<const float*>(samples.const_data_ptr());
  const grid::NearestIndex index(static_cast<const float*>(points.const_data_ptr()), n, p);
  std::vector<int32_t> codes(m);
  std::vector<float> distances(m);
  const Search search = search_of_level();
  parallel_for(m, 4096, [&](int64_t begin, int64_t end) {
    search(index, z + begin * p, end - begin, codes.data() + begin, distances.data() + begin);
  });
  std::vector<double> mass(n), moment(n * p), energy(n);
  for (int64_t i = 0; i < m; ++i) {
    const int32_t cell = codes[i];
    mass[cell] += 1;
    energy[cell] += distances[i];
    for (int64_t q = 0; q < p; ++q) moment[cell * p + q] += z[i * p + q];
  }
  Tensor masses = doubles(points, {n}), moments = doubles(points, {n, p}), energies = doubles(points, {n});
  copy(mass, masses);
  copy(moment, moments);
  copy(energy, energies);
  return {masses, moments, energies};
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_plane_cells(Tensor points) -> (Tensor, Tensor, Tensor)");
  m.def("_plane_search(Tensor points, float tolerance, int hops, int seed) -> Tensor");
  m.def("_sample_cells(Tensor samples, Tensor points) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) {
  TORCHLIN_IMPL(m, "_plane_cells", torchlin::plane_cells);
  TORCHLIN_IMPL(m, "_plane_search", torchlin::plane_search);
  TORCHLIN_IMPL(m, "_sample_cells", torchlin::sample_cells);
}
