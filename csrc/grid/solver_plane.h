// Grids in the plane: the exact mean squared error of a grid under N(0, I_2), its gradient, and descent to a local minimum.
//
// Every Voronoi cell is a polygon, and with u = |z|^2 the integrals over it of phi(z), z phi(z) and |z|^2 phi(z) are integrals
// along its edges (the divergence theorem) of the normal times smooth functions of u, which Gauss-Legendre nodes take to
// machine precision. So no sample is involved, and a minimum that is found is one of the true error.
#pragma once

#include <cstdint>
#include <vector>

namespace torchlin::grid {

struct Cells {
  std::vector<double> mass, moment, energy;  // of each cell: integrals of phi, of z phi (x, y), of |z - c|^2 phi
  double error = 0;                          // the sum of energies: the squared error of a vector, twice that per dimension
};

class PlaneSolver {
 public:
  explicit PlaneSolver(int64_t n) : n_(n) {}

  // points: n pairs.
  void evaluate(const double* points, Cells& cells);

  // Moves the points to a stationary grid nearby (L-BFGS in the metric of Lloyd's step) until a step would gain less than
  // `tolerance` of the error, or `steps` are done. Returns the error.
  double descend(double* points, double tolerance, int64_t steps);

  // Basin hopping: `hops` times disturbs the best grid (a point moved from where it helps little to where it is missed, a
  // patch shaken, a disc turned), descends, and keeps what is better. Returns the error. The same seed gives the same grid.
  double search(double* points, int64_t hops, uint64_t seed);

 private:
  struct Vertex {
    double x, y;
    int64_t beyond;  // the point on the other side of the edge to the next vertex, or -1
  };
  void sort_into_buckets(const double* points);
  void make_polygon(const double* points, int64_t i);
  bool clip(double nx, double ny, double offset, int64_t beyond);

  int64_t n_;
  std::vector<Vertex> polygon_, clipped_;
  std::vector<double> heights_;
  double low_x_ = 0, low_y_ = 0, bucket_ = 1;
  int64_t side_ = 1;
  std::vector<int64_t> first_, members_;
  Cells scratch_;
};

}  // namespace torchlin::grid
