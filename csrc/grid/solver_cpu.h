// What a step of the solver costs: the nearest point of every sample.

#include "grid/nearest_cpu.h"

inline void nearest_samples(const grid::NearestIndex& index, const float* z, int64_t count, int32_t* codes, float* distances) {
  nearest(index, z, count, index.p, codes, distances);
}
