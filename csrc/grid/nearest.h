// What finds the nearest point of a grid: made once a grid, then read by any number of threads (the search itself is
// nearest_cpu.h, compiled for each CPU level). No torch.
//
// The answer is that of a loop over all points: the smallest float32 sum over q of (z_q - c_q)^2, the terms rounded one by one
// and added in order of q, without FMA; of equals the lowest index. So codes are the same bits at every CPU level, and
// those of the reference. Two structures leave out only what cannot be the answer:
//   cells  (p <= 3) a box around the grid cut into equal cells; each lists the points that are nearest anywhere in it, up to
//          rounding. Vectors outside of the box, and cells that would list too many, are left to the tree.
//   tree   16 children a node, 16 points a leaf, a bounding box a child. The distance to a box, rounded like that to a point,
//          is never above the distance to a point in it, because rounding is monotonic.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace torchlin::grid {

inline constexpr int kMostCoordinates = 8;
inline constexpr int kMostOfCells = 3;  // coordinates that cells are made for; in four they take longer to make than they save
inline constexpr int kFan = 16;

struct NearestIndex {
  NearestIndex(const float* grid, int64_t n, int64_t p);  // grid: n rows of p finite numbers

  // The points, coordinate by coordinate: points[q * stride + i], padded with points at infinity.
  int32_t n = 0, p = 0, stride = 0;
  std::vector<float> points;

  // Cells: along coordinate q, z falls into cell floor((z - low[q]) * per_unit[q]), of `side`. A cell's word is
  // begin << 8 | count into `candidates`, ascending; count 0 leaves the vector to the tree, as the last word does, which
  // is that of everything outside. No words, no cells.
  int32_t side = 0;
  float low[kMostOfCells] = {}, per_unit[kMostOfCells] = {};
  std::vector<uint32_t> words;
  std::vector<uint16_t> candidates;

  // Tree: node 0 is the root. Node k's boxes are the p lows at boxes[2 * p * k], then the p highs; a child is another node, or
  // ~leaf. Leaf k's points are the p coordinates at leaf_points[p * k], in order of their indices.
  template <class T>
  struct alignas(64) Lanes {
    T lane[kFan];
  };
  std::vector<Lanes<float>> boxes, leaf_points;
  std::vector<Lanes<int32_t>> children, leaf_indices;

 private:
  void make_cells(const float* grid);
  int32_t make_tree(const float* grid, int32_t* begin, int32_t* end);
};

}  // namespace torchlin::grid
