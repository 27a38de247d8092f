#include "grid/solver_plane.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <random>

namespace torchlin::grid {
namespace {

constexpr double kReach = 9;  // the plane ends here: less than 1e-17 of the mass is beyond
constexpr double kPi = 3.14159265358979323846;

struct Rule {
  int nodes;
  const double *at, *weight;  // on [-1, 1]
};

constexpr double kAt5[] = {-0.9061798459386640, -0.5384693101056831, 0, 0.5384693101056831, 0.9061798459386640};
constexpr double kWeight5[] = {0.2369268850561891, 0.4786286704993665, 0.5688888888888889, 0.4786286704993665, 0.2369268850561891};
constexpr double kAt10[] = {-0.9739065285171717, -0.8650633666889845, -0.6794095682990244, -0.4333953941292472, -0.1488743389816312,
                            0.1488743389816312,  0.4333953941292472,  0.6794095682990244,  0.8650633666889845,  0.9739065285171717};
constexpr double kWeight10[] = {0.0666713443086881, 0.1494513491505806, 0.2190863625159820, 0.2692667193099964, 0.2955242247147529,
                                0.2955242247147529, 0.2692667193099964, 0.2190863625159820, 0.1494513491505806, 0.0666713443086881};

struct EdgeIntegrals {
  double mass = 0, phi = 0, square = 0;  // fluxes of the cell's mass and second moment; the integral of phi
};

// Along the edge from a to b, whose line is at the signed distance h from the origin.
EdgeIntegrals integrate(double ax, double ay, double bx, double by, double length, double h) {
  const Rule rule = length < 0.1 ? Rule{5, kAt5, kWeight5} : Rule{10, kAt10, kWeight10};
  const int pieces = static_cast<int>(length / 0.75) + 1;
  EdgeIntegrals sum;
  for (int piece = 0; piece < pieces; ++piece) {
    const double middle = (piece + 0.5) / pieces, half = 0.5 / pieces;
    for (int k = 0; k < rule.nodes; ++k) {
      const double t = middle + half * rule.at[k];
      const double x = ax + t * (bx - ax), y = ay + t * (by - ay), u = x * x + y * y;
      const double tail = std::exp(-u / 2), weight = rule.weight[k] * half;
      sum.phi += weight * tail;
      if (u > 1e-3) {
        sum.mass += weight * (1 - tail) / u;
        sum.square += weight * (2 - (u + 2) * tail) / u;
      } else {  // their series, where the quotients would lose digits
        sum.mass += weight * (0.5 + u * (-1 / 8. + u * (1 / 48. - u / 384.)));
        sum.square += weight * u * (1 / 4. + u * (-1 / 12. + u * (1 / 64. - u / 480.)));
      }
    }
  }
  const double scale = length / (2 * kPi);
  return {sum.mass * h * scale, sum.phi * scale, sum.square * h * scale};
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace

void PlaneSolver::sort_into_buckets(const double* points) {
  double high_x = -kReach, high_y = -kReach;
  low_x_ = low_y_ = kReach;
  for (int64_t i = 0; i < n_; ++i) {
    low_x_ = std::min(low_x_, points[2 * i]), high_x = std::max(high_x, points[2 * i]);
    low_y_ = std::min(low_y_, points[2 * i + 1]), high_y = std::max(high_y, points[2 * i + 1]);
  }
  side_ = std::max<int64_t>(1, static_cast<int64_t>(std::sqrt(static_cast<double>(n_) / 2)));
  bucket_ = std::max(std::max(high_x - low_x_, high_y - low_y_) / side_ * (1 + 1e-9), 1e-9);
  first_.assign(side_ * side_ + 1, 0);
  members_.resize(n_);
  const auto bucket_of = [&](int64_t i) {
    const int64_t x = static_cast<int64_t>((points[2 * i] - low_x_) / bucket_), y = static_cast<int64_t>((points[2 * i + 1] - low_y_) / bucket_);
    return std::min(y, side_ - 1) * side_ + std::min(x, side_ - 1);
  };
  for (int64_t i = 0; i < n_; ++i) ++first_[bucket_of(i) + 1];
  std::partial_sum(first_.begin(), first_.end(), first_.begin());
  std::vector<int64_t> next(first_.begin(), first_.end() - 1);
  for (int64_t i = 0; i < n_; ++i) members_[next[bucket_of(i)]++] = i;
}

// Keeps the part of the polygon where nx x + ny y <= offset. Whether anything was cut.
bool PlaneSolver::clip(double nx, double ny, double offset, int64_t beyond) {
  const size_t count = polygon_.size();
  heights_.resize(count);
  bool cuts = false;
  for (size_t k = 0; k < count; ++k) {
    heights_[k] = nx * polygon_[k].x + ny * polygon_[k].y - offset;
    cuts |= heights_[k] > 0;
  }
  if (!cuts) return false;
  clipped_.clear();
  for (size_t k = 0; k < count; ++k) {
    const size_t next = k + 1 < count ? k + 1 : 0;
    const Vertex &a = polygon_[k], &b = polygon_[next];
    const bool in = heights_[k] <= 0, next_in = heights_[next] <= 0;
    if (in) clipped_.push_back(a);
    if (in == next_in) continue;
    const double t = heights_[k] / (heights_[k] - heights_[next]);
    clipped_.push_back({a.x + t * (b.x - a.x), a.y + t * (b.y - a.y), in ? beyond : a.beyond});
  }
  polygon_.swap(clipped_);
  return true;
}

// The Voronoi cell of point i: buckets in rings around it, until what is farther away can no longer cut.
void PlaneSolver::make_polygon(const double* points, int64_t i) {
  const double cx = points[2 * i], cy = points[2 * i + 1];
  polygon_.assign({{-kReach, -kReach, -1}, {kReach, -kReach, -1}, {kReach, kReach, -1}, {-kReach, kReach, -1}});
  const auto radius = [&] {
    double most = 0;
    for (const Vertex& v : polygon_) most = std::max(most, (v.x - cx) * (v.x - cx) + (v.y - cy) * (v.y - cy));
    return most;
  };
  double reach = radius();
  const int64_t bx = std::min(static_cast<int64_t>((cx - low_x_) / bucket_), side_ - 1);
  const int64_t by = std::min(static_cast<int64_t>((cy - low_y_) / bucket_), side_ - 1);
  for (int64_t ring = 0; ring < side_; ++ring) {
    const double gap = std::max<double>(0, ring - 1) * bucket_;  // nothing in this ring is nearer
    if (gap * gap > 4 * reach) break;
    for (int64_t y = std::max<int64_t>(by - ring, 0); y <= std::min(by + ring, side_ - 1); ++y) {
      const bool whole_row = y == by - ring || y == by + ring;
      for (int64_t x = bx - ring; x <= bx + ring; x += whole_row || ring == 0 ? 1 : 2 * ring) {
        if (x < 0 || x >= side_) continue;
        for (int64_t k = first_[y * side_ + x]; k < first_[y * side_ + x + 1]; ++k) {
          const int64_t j = members_[k];
          const double dx = points[2 * j] - cx, dy = points[2 * j + 1] - cy, square = dx * dx + dy * dy;
          if (j == i || square > 4 * reach) continue;
          if (clip(dx, dy, dx * (cx + dx / 2) + dy * (cy + dy / 2), j)) reach = radius();
        }
      }
    }
  }
}

void PlaneSolver::evaluate(const double* points, Cells& cells) {
  sort_into_buckets(points);
  cells.mass.assign(n_, 0);
  cells.moment.assign(2 * n_, 0);
  cells.energy.assign(n_, 0);
  for (int64_t i = 0; i < n_; ++i) {
    make_polygon(points, i);
    for (size_t k = 0; k < polygon_.size(); ++k) {
      const Vertex &a = polygon_[k], &b = polygon_[k + 1 < polygon_.size() ? k + 1 : 0];
      const int64_t j = a.beyond;
      if (j >= 0 && j < i) continue;  // done from the other side
      const double dx = b.x - a.x, dy = b.y - a.y, length = std::sqrt(dx * dx + dy * dy);
      if (length == 0) continue;
      const double nx = dy / length, ny = -dx / length;  // outwards: polygons run counter-clockwise
      const EdgeIntegrals edge = integrate(a.x, a.y, b.x, b.y, length, nx * a.x + ny * a.y);
      const auto add = [&](int64_t cell, double sign) {
        cells.mass[cell] += sign * edge.mass;
        cells.moment[2 * cell] -= sign * nx * edge.phi;
        cells.moment[2 * cell + 1] -= sign * ny * edge.phi;
        cells.energy[cell] += sign * edge.square;
      };
      add(i, 1);
      if (j >= 0) add(j, -1);
    }
  }
  cells.error = 0;
  for (int64_t i = 0; i < n_; ++i) {
    const double x = points[2 * i], y = points[2 * i + 1];
    cells.energy[i] += (x * x + y * y) * cells.mass[i] - 2 * (x * cells.moment[2 * i] + y * cells.moment[2 * i + 1]);
    cells.error += cells.energy[i];
  }
}

double PlaneSolver::descend(double* points, double tolerance, int64_t steps) {
  constexpr size_t kMemory = 16;
  struct Pair {
    std::vector<double> step, change;
    double inverse;
  };
  const size_t size = static_cast<size_t>(2 * n_);
  std::deque<Pair> memory;
  std::vector<double> gradient(size), direction(size), trial(size), old(size);
  Cells& cells = scratch_;
  const auto differentiate = [&](const double* at) {
    for (size_t k = 0; k < size; ++k) gradient[k] = 2 * (cells.mass[k / 2] * at[k] - cells.moment[k]);
  };
  evaluate(points, cells);
  differentiate(points);
  double error = cells.error;
  for (int64_t step = 0; step < steps; ++step) {
    // Two loops over the memory; between them Lloyd's step, gradient / (2 mass).
    direction = gradient;
    std::vector<double> share(memory.size());
    for (size_t m = memory.size(); m-- > 0;) {
      share[m] = memory[m].inverse * dot(memory[m].step, direction);
      for (size_t k = 0; k < size; ++k) direction[k] -= share[m] * memory[m].change[k];
    }
    for (size_t k = 0; k < size; ++k) direction[k] /= 2 * std::max(cells.mass[k / 2], 1e-12);
    for (size_t m = 0; m < memory.size(); ++m) {
      const double back = memory[m].inverse * dot(memory[m].change, direction);
      for (size_t k = 0; k < size; ++k) direction[k] += (share[m] - back) * memory[m].step[k];
    }
    double gain = dot(gradient, direction);
    if (!(gain > 0)) {
      if (memory.empty()) break;
      memory.clear();
      continue;
    }
    if (gain < tolerance * error) break;
    old = gradient;
    double rate = 1;
    bool better = false;
    for (int halving = 0; halving < 12; ++halving, rate /= 2) {
      for (size_t k = 0; k < size; ++k) trial[k] = std::clamp(points[k] - rate * direction[k], -kReach / 1.5, kReach / 1.5);
      evaluate(trial.data(), cells);
      if ((better = cells.error < error - 1e-4 * rate * gain)) break;
    }
    if (!better) {
      evaluate(points, cells);
      if (memory.empty()) break;
      memory.clear();
      continue;
    }
    differentiate(trial.data());
    Pair pair{std::vector<double>(size), std::vector<double>(size), 0};
    for (size_t k = 0; k < size; ++k) pair.step[k] = trial[k] - points[k], pair.change[k] = gradient[k] - old[k];
    const double curvature = dot(pair.step, pair.change);
    if (curvature > 0) {
      pair.inverse = 1 / curvature;
      memory.push_back(std::move(pair));
      if (memory.size() > kMemory) memory.pop_front();
    }
    std::copy(trial.begin(), trial.end(), points);
    error = cells.error;
  }
  return error;
}

double PlaneSolver::search(double* points, int64_t hops, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1p-53; };  // the same with every standard library
  const auto below = [&](int64_t limit) { return std::min(static_cast<int64_t>(uniform() * limit), limit - 1); };
  constexpr double kRough = 1e-7, kFine = 1e-13;
  double best = descend(points, kFine, 2000);
  const std::vector<double> start(points, points + 2 * n_);
  std::vector<double> trial(start);
  Cells cells;
  for (int64_t hop = 0; hop < hops; ++hop) {
    std::copy(points, points + 2 * n_, trial.begin());
    evaluate(points, cells);
    const int64_t centre = below(n_);
    const double cx = points[2 * centre], cy = points[2 * centre + 1];
    const double spacing = std::sqrt(cells.energy[centre] / cells.mass[centre]) * 2.5;  // about that of its neighbours
    const double kind = uniform();
    if (kind < 0.5) {
      // From the cheapest of a few cells to beside the dearest of a few.
      int64_t from = below(n_), to = below(n_);
      const int64_t looks = 1 + below(12);
      for (int64_t k = 0; k < looks; ++k) {
        const int64_t a = below(n_), b = below(n_);
        if (cells.energy[a] < cells.energy[from]) from = a;
        if (cells.energy[b] > cells.energy[to]) to = b;
      }
      if (from == to) continue;
      const double angle = 2 * kPi * uniform(), away = 0.5 * std::sqrt(cells.energy[to] / cells.mass[to]);
      trial[2 * from] = points[2 * to] + away * std::cos(angle);
      trial[2 * from + 1] = points[2 * to + 1] + away * std::sin(angle);
    } else if (kind < 0.8) {
      const double radius = spacing * (1 + 3 * uniform()), strength = spacing * (0.2 + 0.6 * uniform());
      for (int64_t i = 0; i < n_; ++i) {
        if (std::hypot(points[2 * i] - cx, points[2 * i + 1] - cy) > radius) continue;
        trial[2 * i] += strength * (2 * uniform() - 1);
        trial[2 * i + 1] += strength * (2 * uniform() - 1);
      }
    } else {
      // A disc around the origin, or around a point, turned against the rest.
      const bool central = kind < 0.92;
      const double ox = central ? 0 : cx, oy = central ? 0 : cy, radius = central ? std::hypot(cx, cy) : spacing * (1 + 3 * uniform());
      const double angle = central ? (2 * uniform() - 1) * spacing / std::max(radius, spacing) : 2 * kPi * uniform();
      for (int64_t i = 0; i < n_; ++i) {
        const double x = points[2 * i] - ox, y = points[2 * i + 1] - oy;
        if (x * x + y * y > radius * radius) continue;
        trial[2 * i] = ox + std::cos(angle) * x - std::sin(angle) * y;
        trial[2 * i + 1] = oy + std::sin(angle) * x + std::cos(angle) * y;
      }
    }
    double error = descend(trial.data(), kRough, 400);
    if (error > best * (1 + 3e-5)) continue;
    error = descend(trial.data(), kFine, 2000);
    if (error < best * (1 - 1e-11)) {
      best = error;
      std::copy(trial.begin(), trial.end(), points);
    }
  }
  return best;
}

}  // namespace torchlin::grid
