#include "grid/nearest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace torchlin::grid {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kMostInCell = 255, kMostCandidates = size_t{1} << 23;
constexpr double kRoom = 1.25;         // the box of cells is larger than the grid: normal vectors rarely lie outside of it
constexpr int32_t kCellsFrom = 24;  // points that are looked at one by one sooner than looked up

struct Box {
  double low[kMostOfCells], high[kMostOfCells];
};

// Fills the table by halving the box along every coordinate, down to the cells, and handing on only the points that some
// point of the half can be nearest to.
class CellMaker {
 public:
  CellMaker(NearestIndex& index, const float* grid, const Box& box) : index_(index), grid_(grid), box_(box) {}

  bool run() {
    std::vector<int32_t> all(index_.n);
    std::iota(all.begin(), all.end(), 0);
    const int32_t from[kMostOfCells] = {};
    descend(from, index_.side, all);
    return index_.candidates.size() < kMostCandidates;
  }

 private:
  void descend(const int32_t* from, int32_t side, const std::vector<int32_t>& points) {
    const Box box = box_of(from, side);
    std::vector<int32_t> kept = near_pivot(points, box);
    if (side == 1 || kept.size() <= 8) remove_dominated(kept, box);
    if (side == 1 || kept.size() == 1) return fill(from, side, kept);
    const int32_t half = side / 2;
    for (int corner = 0; corner < 1 << index_.p; ++corner) {
      int32_t at[kMostOfCells] = {};
      for (int q = 0; q < index_.p; ++q) at[q] = from[q] + (corner >> q & 1) * half;
      descend(at, half, kept);
    }
  }

  // A little larger than the cells are: the search rounds before it takes the floor.
  Box box_of(const int32_t* from, int32_t side) const {
    Box box{};
    for (int q = 0; q < index_.p; ++q) {
      const double cell = (box_.high[q] - box_.low[q]) / index_.side;
      const double room = cell * (index_.side * 0x1p-20 + 0x1p-10) + 0x1p-20 * std::max(std::abs(box_.low[q]), std::abs(box_.high[q]));
      box.low[q] = box_.low[q] + from[q] * cell - room;
      box.high[q] = box_.low[q] + (from[q] + side) * cell + room;
    }
    return box;
  }

  double coordinate(int32_t i, int q) const { return grid_[static_cast<int64_t>(i) * index_.p + q]; }

  // Whether, in all of the box, i is farther away than j by more than the rounding of both distances.
  bool dominated(int32_t i, int32_t j, const Box& box) const {
    double lead = 0, farthest = 0;  // the smallest |z - c_i|^2 - |z - c_j|^2, and the largest |z - c_i|^2
    for (int q = 0; q < index_.p; ++q) {
      const double a = coordinate(i, q), b = coordinate(j, q);
      const double slope = 2 * (b - a);
      lead += (a - b) * (a + b) + std::min(slope * box.low[q], slope * box.high[q]);
      const double reach = std::max(std::abs(box.low[q] - a), std::abs(box.high[q] - a));
      farthest += reach * reach;
    }
    return lead > 0x1p-19 * farthest + 1e-36;
  }

  std::vector<int32_t> near_pivot(const std::vector<int32_t>& points, const Box& box) const {
    int32_t pivot = points[0];
    double best = std::numeric_limits<double>::infinity();
    for (const int32_t i : points) {
      double d = 0;
      for (int q = 0; q < index_.p; ++q) {
        const double step = coordinate(i, q) - (box.low[q] + box.high[q]) / 2;
        d += step * step;
      }
      if (d < best) best = d, pivot = i;
    }
    std::vector<int32_t> kept;
    for (const int32_t i : points) {
      if (!dominated(i, pivot, box)) kept.push_back(i);
    }
    return kept;
  }

  void remove_dominated(std::vector<int32_t>& points, const Box& box) const {
    if (points.size() > kMostInCell) return;
    const auto bad = [&](int32_t i) {
      return std::any_of(points.begin(), points.end(), [&](int32_t j) { return j != i && dominated(i, j, box); });
    };
    std::vector<int32_t> kept;
    std::copy_if(points.begin(), points.end(), std::back_inserter(kept), [&](int32_t i) { return !bad(i); });
    points = kept;
  }

  void fill(const int32_t* from, int32_t side, const std::vector<int32_t>& points) {
    if (points.size() > kMostInCell || index_.candidates.size() >= kMostCandidates) return;  // the word stays 0
    const uint32_t word = static_cast<uint32_t>(index_.candidates.size() << 8 | points.size());
    for (const int32_t i : points) index_.candidates.push_back(static_cast<uint16_t>(i));
    const int p = index_.p;
    int64_t rows = 1;
    for (int q = 1; q < p; ++q) rows *= side;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t first = 0, rest = r;
      for (int q = p - 1; q > 0; --q) first = (first + from[q] + rest % side) * index_.side, rest /= side;
      std::fill_n(index_.words.begin() + first + from[0], side, word);
    }
  }

  NearestIndex& index_;
  const float* grid_;
  Box box_;
};

}  // namespace

NearestIndex::NearestIndex(const float* grid, int64_t n_, int64_t p_) : n(static_cast<int32_t>(n_)), p(static_cast<int32_t>(p_)) {
  stride = (n + kFan - 1) / kFan * kFan;
  points.assign(static_cast<size_t>(p) * stride, kInfinity);
  for (int32_t i = 0; i < n; ++i) {
    for (int32_t q = 0; q < p; ++q) points[static_cast<size_t>(q) * stride + i] = grid[static_cast<int64_t>(i) * p + q];
  }
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  make_tree(grid, order.data(), order.data() + n);
  if (p <= kMostOfCells && n >= kCellsFrom) make_cells(grid);
}

void NearestIndex::make_cells(const float* grid) {
  // More cells leave fewer candidates in each, but also the caches.
  const int64_t wanted = std::min<int64_t>(std::max<int64_t>(32 * int64_t{n}, 1 << 12), 1 << 18);
  side = 2;
  const auto total = [&](int64_t s) {
    int64_t cells = 1;
    for (int32_t q = 0; q < p; ++q) cells *= s;
    return cells;
  };
  while (total(side * 2) <= wanted) side *= 2;
  Box box{};
  for (int32_t q = 0; q < p; ++q) {
    const float* row = &points[static_cast<size_t>(q) * stride];
    const auto [least, most] = std::minmax_element(row, row + n);
    const double middle = (double{*least} + *most) / 2, half = (double{*most} - *least) / 2;
    if (!(half > 1e-15 && half < 1e15 && std::abs(middle) < 1e4 * half)) return;  // not what cells are good for
    box.low[q] = middle - half * kRoom;
    box.high[q] = middle + half * kRoom;
    low[q] = static_cast<float>(box.low[q]);
    per_unit[q] = static_cast<float>(side / (box.high[q] - box.low[q]));
  }
  words.assign(total(side) + 1, 0);
  if (!CellMaker(*this, grid, box).run()) words.clear(), candidates.clear();
  candidates.push_back(0);  // the search reads pairs
}

// Reorders the indices in [begin, end).
int32_t NearestIndex::make_tree(const float* grid, int32_t* begin, int32_t* end) {
  const auto at = [&](int32_t i, int32_t q) { return grid[static_cast<int64_t>(i) * p + q]; };
  const auto extent = [&](const int32_t* from, const int32_t* to, int32_t q) {
    float least = kInfinity, most = -kInfinity;
    for (const int32_t* i = from; i < to; ++i) least = std::min(least, at(*i, q)), most = std::max(most, at(*i, q));
    return std::pair(least, most);
  };
  if (end - begin <= kFan && !children.empty()) {
    std::sort(begin, end);
    const size_t self = leaf_indices.size();
    leaf_indices.emplace_back();
    leaf_points.resize(leaf_points.size() + p);
    for (int32_t j = 0; j < kFan; ++j) {
      const bool real = j < end - begin;
      leaf_indices[self].lane[j] = real ? begin[j] : std::numeric_limits<int32_t>::max();
      for (int32_t q = 0; q < p; ++q) leaf_points[self * p + q].lane[j] = real ? at(begin[j], q) : kInfinity;
    }
    return ~static_cast<int32_t>(self);
  }
  const size_t self = children.size();
  children.emplace_back();
  boxes.resize(boxes.size() + 2 * p);
  // Halves of halves along the widest coordinate, in whole leaves.
  std::vector<int32_t*> cuts{begin, end};
  for (int round = 0; round < 4; ++round) {
    std::vector<int32_t*> finer{begin};
    for (size_t k = 0; k + 1 < cuts.size(); ++k) {
      int32_t *from = cuts[k], *to = cuts[k + 1];
      const int64_t blocks = (to - from + kFan - 1) / kFan;
      if (blocks > 1) {
        int32_t widest = 0;
        double width = -1;
        for (int32_t q = 0; q < p; ++q) {
          const auto [least, most] = extent(from, to, q);
          if (double{most} - least > width) width = double{most} - least, widest = q;
        }
        int32_t* middle = from + blocks / 2 * kFan;
        std::nth_element(from, middle, to, [&](int32_t i, int32_t j) {
          return at(i, widest) != at(j, widest) ? at(i, widest) < at(j, widest) : i < j;
        });
        finer.push_back(middle);
      }
      finer.push_back(to);
    }
    cuts = finer;
  }
  for (int32_t k = 0; k < kFan; ++k) {
    const bool real = k + 1 < static_cast<int32_t>(cuts.size());
    for (int32_t q = 0; q < p; ++q) {
      const auto [least, most] = real ? extent(cuts[k], cuts[k + 1], q) : std::pair(kInfinity, kInfinity);
      boxes[2 * p * self + q].lane[k] = least;
      boxes[2 * p * self + p + q].lane[k] = most;
    }
    const int32_t child = real ? make_tree(grid, cuts[k], cuts[k + 1]) : ~0;
    children[self].lane[k] = child;  // not before: they may have moved
  }
  return static_cast<int32_t>(self);
}

}  // namespace torchlin::grid
