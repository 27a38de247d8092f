// y = x W'^T + b. One row of x: permute_cpu.h, bytes_cpu.h or lookup_cpu.h, straight from the codes. More: a tile of the weight is made
// in cache, and multiplied with all rows of x, so that a code is looked up once a call.

template <int Mask = kLanes<float> / 2>
TORCHLIN_INLINE float sum_lanes(V<float> v) {
  v += shuffle_xor<float, Mask>(v);
  if constexpr (Mask > 1) return sum_lanes<Mask / 2>(v);
  return v[0];
}

#include "grid/permute_cpu.h"
#include "grid/bytes_cpu.h"
#include "grid/lookup_cpu.h"

// How x and the weight's tiles lie for a grid: in steps of a permute kernel, or plainly, in steps of kCodesAtATime codes.
struct Plan {
  bool permuted = false;
#if TORCHLIN_ISA_BYTES >= 32
  const PermuteKernel* kernel = nullptr;
#endif
  int64_t step_codes, step_width;  // codes and floats of a step
  int64_t steps, width;            // of a row; the last plain step may be shorter
  int64_t tile;                    // steps of a tile
  int64_t x_floats, lane_floats = 0, table_floats = 0;  // of what is prepared
  bool lanes = false;                                    // several scales a row, in a permuted order
  float unit = 0;                                        // of the points as bytes, if they are

  explicit Plan(const grid::Linear& job) {
    const grid::Weight& w = job.weight;
    constexpr int W = kLanes<float>;
    constexpr int64_t kTileWidth = 1024;  // 4 rows of it, and 6 of x, are in L1
#if TORCHLIN_ISA_BYTES >= 32
    for (const PermuteKernel& k : kPermutes) {
      const bool fits = w.blocks <= 1 || w.block % (k.group * w.p) == 0;
      if (w.n == int64_t{1} << k.bits && w.p == k.p && fits) kernel = &k;
    }
#if TORCHLIN_ISA_BYTES == 64
    if (kernel == nullptr && w.n <= 256 && w.p <= 4 && (w.blocks <= 1 || w.block % (kByteGroup * w.p) == 0) &&
        ByteCodes::reads(w.layout) && byte_kernels_run()) {
      unit = fixed_point_unit(w.grid, w.n * w.p);
      if (unit != 0) {
        kernel = &kByteKernels[byte_tables(w.n) / 2][w.p - 1];
        table_floats = 2 * w.p * byte_tables(w.n) * 64 / static_cast<int64_t>(sizeof(float));
      }
    }
#endif
    if (kernel != nullptr) {
      permuted = true;
      step_codes = int64_t{kernel->group} * W;
      step_width = step_codes * w.p;
      steps = (w.count + step_codes - 1) / step_codes;
      width = steps * step_width;
      tile = std::max<int64_t>(1, kTileWidth / step_width);
      lanes = w.blocks > 1;
      x_floats = job.batch * width;
      lane_floats = lanes ? steps * (W + 1) : 0;
      return;
    }
#endif
    const int64_t step = job.batch == 1 ? grid::table_step(w.p) : w.p;
    step_codes = kTileWidth / w.p / 48 * 48;
    step_width = step_codes * w.p;
    steps = (w.count + step_codes - 1) / step_codes;
    width = (w.count * step + W - 1) / W * W;
    tile = 1;
    x_floats = job.batch * width;
    table_floats = grid::table_step(w.p) == w.p ? 0 : w.n * grid::table_step(w.p);
  }
};

inline int64_t linear_prepared(const grid::Linear& job) {
  const Plan plan(job);
  return plan.x_floats + plan.lane_floats + plan.table_floats;
}

#if TORCHLIN_ISA_BYTES >= 32
// The first block of each step, and which from there on a lane's codes belong to.
inline grid::PermutePlan permute_plan(const Plan& plan, const float* ready) {
  grid::PermutePlan row{plan.steps};
  if (plan.lanes) {
    row.lane = reinterpret_cast<const int32_t*>(ready + plan.x_floats);
    row.first = row.lane + plan.steps * kW;
  }
  if (plan.unit != 0) {
    row.tables = reinterpret_cast<const uint8_t*>(ready + plan.x_floats + plan.lane_floats);
    row.unit = plan.unit;
  }
  return row;
}
#endif

template <class T>
void linear_prepare(const grid::Linear& job, float* ready) {
  const grid::Weight& w = job.weight;
  const Plan plan(job);
  for (int64_t b = 0; b < job.batch; ++b) {
    const T* x = static_cast<const T*>(job.x) + b * w.in;
    float* to = ready + b * plan.width;
#if TORCHLIN_ISA_BYTES >= 32
    if (plan.permuted) {
      const int64_t G = plan.kernel->group, P = w.p, lane = G * P;
      for (int64_t s = 0; s < plan.steps; ++s, to += plan.step_width) {
        const int64_t first = s * plan.step_width;
        for (int64_t i = 0; i < lane; ++i) {
          for (int64_t l = 0; l < kW; ++l) {
            const int64_t at = first + l * lane + i;
            to[i * kW + l] = at < w.in ? load_one(x + at) : 0;
          }
        }
      }
      continue;
    }
#endif
    const int64_t step = job.batch == 1 ? grid::table_step(w.p) : w.p;
    for (int64_t i = 0; i < plan.width; ++i) to[i] = 0;
    for (int64_t i = 0; i < w.in; ++i) to[step == w.p ? i : i / w.p * step + i % w.p] = load_one(x + i);
  }
#if TORCHLIN_ISA_BYTES >= 32
  if (plan.permuted) {
#if TORCHLIN_ISA_BYTES == 64
    if (plan.unit != 0) {
      uint8_t* tables = reinterpret_cast<uint8_t*>(ready + plan.x_floats + plan.lane_floats);
      fill_byte_tables(w.grid, w.n, w.p, plan.unit, tables);
    }
#endif
    if (!plan.lanes) return;
    int32_t* lane = reinterpret_cast<int32_t*>(ready + plan.x_floats);
    int32_t* first = lane + plan.steps * kW;
    const int64_t of_lane = plan.step_width / kW;
    for (int64_t s = 0; s < plan.steps; ++s) {
      const int64_t b = s * plan.step_width / w.block;
      first[s] = static_cast<int32_t>(std::min(b, w.blocks - 1));
      for (int l = 0; l < kW; ++l) {
        const int64_t of = std::min((s * plan.step_width + l * of_lane) / w.block, w.blocks - 1);
        lane[s * kW + l] = static_cast<int32_t>(of - first[s]);
      }
    }
    return;
  }
#endif
  if (plan.table_floats > 0) grid::fill_table(w.grid, w.n, w.p, grid::table_step(w.p), ready + plan.x_floats);
}

// ---- several rows of x

#if TORCHLIN_ISA_BYTES == 64
inline constexpr int kTileRows = 4, kTileBatch = 6;  // sums in registers
#else
inline constexpr int kTileRows = 2, kTileBatch = 6;
#endif
// Rows of the weight at a time: few, so that a tile of them stays in L1, or, with many rows of x, in L2 while x goes by.
TORCHLIN_INLINE int64_t block_rows(int64_t batch) { return batch <= 24 ? 8 : 64; }

// Lane l of the sum of all lanes of rows[l], R rows.
template <int R>
TORCHLIN_INLINE V<float> sum_each(const V<float>* rows) {
  V<int32_t> odd, second;
  for (int i = 0; i < kLanes<float>; ++i) odd[i] = -(i & 1), second[i] = -(i >> 1 & 1);
  const auto pair = [](V<int32_t> upper, V<float> a, V<float> b, V<float> a_moved, V<float> b_moved)
      __attribute__((always_inline)) { return (upper ? b : a) + (upper ? b_moved : a_moved); };
  const auto once = [&](const V<float>* v) __attribute__((always_inline)) {
    return pair(odd, v[0], v[1], shuffle_xor<float, 1>(v[0]), shuffle_xor<float, 1>(v[1]));
  };
  V<float> sum = once(rows);
  if constexpr (R == 4) {
    const V<float> other = once(rows + 2);
    sum = pair(second, sum, other, shuffle_xor<float, 2>(sum), shuffle_xor<float, 2>(other));
  } else {
    sum += shuffle_xor<float, 2>(sum);
  }
  if constexpr (kLanes<float> >= 8) sum += shuffle_xor<float, 4>(sum);
  if constexpr (kLanes<float> >= 16) sum += shuffle_xor<float, 8>(sum);
  return sum;
}

// sums[b * sums_step + r] += a row of the tile times one of x, over `width` floats.
template <int B>
void multiply_tile(const float* tile, int64_t tile_step, const float* x, int64_t x_step, int64_t width, float* sums,
                   int64_t sums_step) {
  constexpr int W = kLanes<float>, R = kTileRows;
  V<float> acc[B][R] = {};
  for (int64_t i = 0; i < width; i += W) {
    V<float> rows[R];
    unroll<R>([&](int r) __attribute__((always_inline)) { rows[r] = load(tile + r * tile_step + i); });
    unroll<B>([&](int b) __attribute__((always_inline)) {
      const V<float> xv = load(x + b * x_step + i);
      unroll<R>([&](int r) __attribute__((always_inline)) { acc[b][r] += rows[r] * xv; });
    });
  }
  unroll<B>([&](int b) __attribute__((always_inline)) {
    const V<float> sum = sum_each<R>(acc[b]);
    unroll<R>([&](int r) __attribute__((always_inline)) { sums[b * sums_step + r] += sum[r]; });
  });
}

inline constexpr auto kMultiply = std::array{&multiply_tile<1>, &multiply_tile<2>, &multiply_tile<3>,
                                             &multiply_tile<4>, &multiply_tile<5>, &multiply_tile<6>};

// Steps [first, last) of some rows as weights, in the order of x. Returns how many floats a row has; what fills it up is zero.
inline int64_t make_tile(const grid::Linear& job, const Plan& plan, const float* table, int64_t row, int64_t rows, int64_t first,
                         int64_t last, float* weights, int64_t stride) {
  const grid::Weight& w = job.weight;
#if TORCHLIN_ISA_BYTES >= 32
  if (plan.permuted) {
    plan.kernel->weights(w, permute_plan(plan, job.ready), row, rows, first, last, weights, stride);
    return (last - first) * plan.step_width;
  }
#endif
  constexpr int64_t W = kLanes<float>;
  uint16_t* codes = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, plan.step_codes);
  const int64_t code = first * plan.step_codes, size = std::min(plan.step_codes, w.count - code), from = code * w.p;
  const int64_t width = (size * w.p + W - 1) / W * W, real = std::min(w.in - from, size * w.p);
  for (int64_t r = row; r < row + rows; ++r, weights += stride) {
    points_of_row(w, r, code, size, table, codes, weights);
    apply_scales(w, r, from, from + real, weights);
    for (int64_t l = real; l < width; ++l) weights[l] = 0;
  }
  return width;
}

template <class T>
TORCHLIN_INLINE void put(const grid::Linear& job, int64_t b, int64_t r, float sum) {
  const float bias = job.bias == nullptr ? 0 : load_one(static_cast<const T*>(job.bias) + r);
  store_one(static_cast<T*>(job.y) + b * job.weight.out + r, sum + bias);
}

template <class T>
void one_row(const grid::Linear& job, const Plan& plan, const float* table, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 256;
  float y[kRows];
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t last = std::min(end, r + kRows);
#if TORCHLIN_ISA_BYTES >= 32
    if (plan.permuted) {
      plan.kernel->gemv(job, permute_plan(plan, job.ready), y - r, r, last);
    } else
#endif
      kLookupGemv[job.weight.p - 1](job, table, y - r, r, last);
    for (int64_t i = r; i < last; ++i) put<T>(job, 0, i, y[i - r]);
  }
}

template <class T>
void several_rows(const grid::Linear& job, const Plan& plan, const float* table, int64_t begin, int64_t end) {
  const int64_t most = block_rows(job.batch), stride = (plan.tile * plan.step_width + kCopySlack) / kLanes<float> * kLanes<float> + 3 * kLanes<float>;
  float* weights = grid::Scratch::get<float>(grid::Purpose::kWeights, most * stride);
  float* sums = grid::Scratch::get<float>(grid::Purpose::kSums, job.batch * most);
  const int64_t groups = (job.batch + kTileBatch - 1) / kTileBatch;
  for (int64_t r = begin; r < end; r += most) {
    const int64_t rows = std::min(most, end - r), whole = (rows + kTileRows - 1) / kTileRows * kTileRows;
    std::memset(sums, 0, static_cast<size_t>(job.batch * most) * sizeof(float));
    for (int64_t s = 0; s < plan.steps; s += plan.tile) {
      const int64_t width = make_tile(job, plan, table, r, rows, s, std::min(plan.steps, s + plan.tile), weights, stride);
      for (int64_t i = rows; i < whole; ++i) std::memcpy(weights + i * stride, weights, static_cast<size_t>(width) * sizeof(float));
      const float* x = job.ready + s * plan.step_width;
      for (int64_t g = 0, b = 0; g < groups; ++g) {
        const int64_t size = (job.batch - b + groups - g - 1) / (groups - g);
        for (int64_t i = 0; i < whole; i += kTileRows) {
          kMultiply[static_cast<size_t>(size - 1)](weights + i * stride, stride, x + b * plan.width, plan.width, width,
                                                   sums + b * most + i, most);
        }
        b += size;
      }
    }
    for (int64_t b = 0; b < job.batch; ++b) {
      for (int64_t i = 0; i < rows; ++i) put<T>(job, b, r + i, sums[b * most + i]);
    }
  }
}

template <class T>
void linear_rows(const grid::Linear& job, int64_t begin, int64_t end) {
  const Plan plan(job);
  const float* table = plan.table_floats > 0 && !plan.permuted ? job.ready + plan.x_floats : job.weight.grid;
  if (job.batch == 1) return one_row<T>(job, plan, table, begin, end);
  several_rows<T>(job, plan, table, begin, end);
}

template <class T>
constexpr grid::LinearKernel linear_kernel_of() {
  return {&linear_prepared, &linear_prepare<T>, &linear_rows<T>};
}
