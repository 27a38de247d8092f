// The nearest grid point of each vector, exactly as a loop over all points would find it: see grid/nearest.h, which has to be
// included outside. Included by a kernel that foreach_isa.h compiles once per CPU level, so it includes nothing.
//
//   nearest(index, z, count, r, codes, distances)
//
// z: count vectors of r consecutive floats each, finite; r = index.p, or fewer for a ragged last vector, whose missing coordinates
// count as nothing. codes: count indices, of any unsigned or signed integer type that holds them. distances (squared, float32) may
// be null.

TORCHLIN_INLINE V<float> gather(const float* base, V<int32_t> at) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<float>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, (__m512i)at, base, 4);
#elif TORCHLIN_ISA_BYTES == 32
  return (V<float>)_mm256_i32gather_ps(base, (__m256i)at, 4);
#else
  V<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = base[at[i]];
  return v;
#endif
}

TORCHLIN_INLINE V<int32_t> gather(const uint32_t* base, V<int32_t> at) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<int32_t>)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), kAll, (__m512i)at, base, 4);
#elif TORCHLIN_ISA_BYTES == 32
  return (V<int32_t>)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)at, 4);
#else
  V<int32_t> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<int32_t>(base[at[i]]);
  return v;
#endif
}

// Reads two bytes past base[at].
TORCHLIN_INLINE V<int32_t> gather(const uint16_t* base, V<int32_t> at) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<int32_t>)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), kAll, (__m512i)at, base, 2) & 0xffff;
#elif TORCHLIN_ISA_BYTES == 32
  return (V<int32_t>)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)at, 2) & 0xffff;
#else
  V<int32_t> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = base[at[i]];
  return v;
#endif
}

// One bit a lane of a comparison.
TORCHLIN_INLINE uint32_t lane_bits(V<int32_t> mask) {
#if TORCHLIN_ISA_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif TORCHLIN_ISA_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

template <int Mask = kLanes<float> / 2>
TORCHLIN_INLINE float least_lane(V<float> v) {
  const V<float> other = shuffle_xor<float, Mask>(v);
  v = v < other ? v : other;
  if constexpr (Mask > 1) return least_lane<Mask / 2>(v);
  return v[0];
}

// total + step * step in two roundings: the compiler may not make an FMA of it.
TORCHLIN_INLINE V<float> add_square(V<float> total, V<float> step) {
  V<float> square = step * step;
  opaque(square);
  return total + square;
}

template <int R, class Load>
TORCHLIN_INLINE V<float> distance(const V<float>* z, const Load& point) {
  const V<float> first = z[0] - point(0);
  V<float> total = first * first;
  opaque(total);
  unroll<R - 1>([&](int q) __attribute__((always_inline)) { total = add_square(total, z[q + 1] - point(q + 1)); });
  return total;
}

// ---- one vector a lane: every point in turn, or a cell's

template <int R>
TORCHLIN_INLINE void nearest_of_all(const grid::NearestIndex& index, const V<float>* z, V<float>& best, V<int32_t>& code) {
  const float* points = index.points.data();
  const int64_t stride = index.stride;
  for (int32_t i = 0; i < index.n; ++i) {
    const V<float> d = distance<R>(z, [&](int q) __attribute__((always_inline)) { return splat(points[q * stride + i]); });
    const V<int32_t> closer = d < best;
    best = closer ? d : best;
    code = closer ? V<int32_t>{} + i : code;
  }
}

// Returns the lanes that are left to the tree.
template <int P>
TORCHLIN_INLINE uint32_t nearest_of_cell(const grid::NearestIndex& index, const V<float>* z, V<float>& best, V<int32_t>& code) {
  const float* points = index.points.data();
  V<int32_t> cell = {}, inside = ~V<int32_t>{};
  unroll<P>([&](int i) __attribute__((always_inline)) {
    const int q = P - 1 - i;
    const V<float> place = (z[q] - index.low[q]) * index.per_unit[q];
    inside &= (place >= 0) & (place < static_cast<float>(index.side));
    cell = cell * index.side + __builtin_convertvector(place, V<int32_t>);
  });
  cell = inside ? cell : V<int32_t>{} + static_cast<int32_t>(index.words.size() - 1);
  const V<int32_t> word = gather(index.words.data(), cell);
  const V<int32_t> count = word & 255, begin = (V<int32_t>)((V<uint32_t>)word >> 8), last = count - 1;
  for (int32_t k = 0;; ++k) {
    const V<int32_t> more = count > k;
    if (lane_bits(more) == 0) break;
    const V<int32_t> i = gather(index.candidates.data(), begin + (more ? V<int32_t>{} + k : last & (count != 0)));
    const V<float> d =
        distance<P>(z, [&](int q) __attribute__((always_inline)) { return gather(points + q * int64_t{index.stride}, i); });
    const V<int32_t> closer = d < best;
    best = closer ? d : best;
    code = closer ? i : code;
  }
  return lane_bits(count == 0);
}

// ---- one vector at a time: down the tree, a point or a child a lane

struct Nearest {
  float distance;
  int32_t code;
};

template <int P>
void nearest_in_node(const grid::NearestIndex& index, int32_t at, const float* z, Nearest& best) {
  constexpr int kWidth = kLanes<float>, kVectors = grid::kFan / kWidth;
  const auto* lows = &index.boxes[static_cast<size_t>(2 * P) * at];
  const int32_t* children = index.children[at].lane;
  alignas(64) float bounds[grid::kFan];
  V<float> least = {};
  for (int v = 0; v < kVectors; ++v) {
    V<float> total = {};
    unroll<P>([&](int q) __attribute__((always_inline)) {
      const V<float> below = load(lows[q].lane + v * kWidth) - z[q], above = z[q] - load(lows[P + q].lane + v * kWidth);
      V<float> step = below > above ? below : above;
      step = step > 0 ? step : V<float>{};
      if (q == 0) {
        total = step * step;
        opaque(total);
      } else {
        total = add_square(total, step);
      }
    });
    store(bounds + v * kWidth, total);
    least = v == 0 || total < least ? total : least;
  }
  const auto visit = [&](int k) {
    const int32_t child = children[k];
    if (child >= 0) return nearest_in_node<P>(index, child, z, best);
    const auto* leaf = &index.leaf_points[static_cast<size_t>(P) * ~child];
    V<float> around[P];
    unroll<P>([&](int q) __attribute__((always_inline)) { around[q] = splat(z[q]); });
    for (int v = 0; v < kVectors; ++v) {
      const V<float> d =
          distance<P>(around, [&](int q) __attribute__((always_inline)) { return load(leaf[q].lane + v * kWidth); });
      if (lane_bits(d <= best.distance) == 0) continue;
      const float nearest = least_lane(d);
      const int32_t code = index.leaf_indices[~child].lane[v * kWidth + __builtin_ctz(lane_bits(d == nearest))];
      if (nearest < best.distance || code < best.code) best = {nearest, code};
    }
  };
  // The nearest child first, which leaves little to do for the others.
  int first = 0;
  const float smallest = least_lane(least);
  while (bounds[first] != smallest) ++first;
  if (smallest <= best.distance) visit(first);
  for (int v = 0; v < kVectors; ++v) {
    uint32_t open = lane_bits(load(bounds + v * kWidth) <= best.distance);
    for (; open != 0; open &= open - 1) {
      const int k = v * kWidth + __builtin_ctz(open);
      if (k != first && bounds[k] <= best.distance) visit(k);
    }
  }
}

template <int P>
inline Nearest nearest_in_tree(const grid::NearestIndex& index, const float* z) {
  // Infinite distances are equal too: the first point wins.
  Nearest best{std::numeric_limits<float>::infinity(), 0};
  nearest_in_node<P>(index, 0, z, best);
  return best;
}

// ---- any number of vectors

template <int R, class Code>
void nearest_of(const grid::NearestIndex& index, const float* z, int64_t count, Code* codes, float* distances) {
  constexpr int kWidth = kLanes<float>;
  const bool ragged = R < index.p, all = ragged || index.n <= 256;
  const bool cells = R <= grid::kMostOfCells && !ragged && !index.words.empty();
  if (!cells && !all) {
    for (int64_t i = 0; i < count; ++i) {
      const Nearest best = nearest_in_tree<R>(index, z + i * R);
      codes[i] = static_cast<Code>(best.code);
      if (distances != nullptr) distances[i] = best.distance;
    }
    return;
  }
  V<int32_t> lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i * R;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t here = std::min<int64_t>(kWidth, count - i);
    alignas(64) float padded[kWidth * R];
    const float* from = z + i * R;
    if (here < kWidth) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, from, static_cast<size_t>(here) * R * sizeof(float));
      from = padded;
    }
    V<float> around[R];
    unroll<R>([&](int q) __attribute__((always_inline)) { around[q] = R == 1 ? load(from) : gather(from + q, lane); });
    V<float> best = splat(std::numeric_limits<float>::infinity());
    V<int32_t> code = {};
    uint32_t rest = 0;
    if constexpr (R <= grid::kMostOfCells) {
      if (cells) rest = nearest_of_cell<R>(index, around, best, code);
    }
    if (!cells) nearest_of_all<R>(index, around, best, code);
    for (; rest != 0; rest &= rest - 1) {
      const int k = __builtin_ctz(rest);
      if (k >= here) break;
      const Nearest found = nearest_in_tree<R>(index, from + k * R);
      best[k] = found.distance;
      code[k] = found.code;
    }
    const auto narrow = __builtin_convertvector(code, typename vector_of<Code, kWidth>::type);
    std::memcpy(codes + i, &narrow, static_cast<size_t>(here) * sizeof(Code));
    if (distances != nullptr) std::memcpy(distances + i, &best, static_cast<size_t>(here) * sizeof(float));
  }
}

template <class Code>
void nearest(const grid::NearestIndex& index, const float* z, int64_t count, int64_t r, Code* codes, float* distances = nullptr) {
  switch (r) {
    case 1: return nearest_of<1>(index, z, count, codes, distances);
    case 2: return nearest_of<2>(index, z, count, codes, distances);
    case 3: return nearest_of<3>(index, z, count, codes, distances);
    case 4: return nearest_of<4>(index, z, count, codes, distances);
    case 5: return nearest_of<5>(index, z, count, codes, distances);
    case 6: return nearest_of<6>(index, z, count, codes, distances);
    case 7: return nearest_of<7>(index, z, count, codes, distances);
    case 8: return nearest_of<8>(index, z, count, codes, distances);
    default: return;
  }
}
