// y = x W'^T + b. One row of x: permute_cpu.h or lookup_cpu.h, straight from the codes. More: a tile of the weight is made
// in cache, and multiplied with all rows of x, so that a code is looked up once a call.

TORCHLIN_INLINE float sum_lanes(V<float> v) {
  float sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += v[i];
  return sum;
}

#include "grid/permute_cpu.h"
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
  int64_t x_floats, table_floats;
  bool lanes = false;  // several scales a row, in a permuted order

  explicit Plan(const grid::Linear& job) {
    const grid::Weight& w = job.weight;
    constexpr int W = kLanes<float>;
    constexpr int64_t kTileWidth = 1024;  // 4 rows of it, and 6 of x, are in L1
#if TORCHLIN_ISA_BYTES >= 32
    for (const PermuteKernel& k : kPermutes) {
      const bool fits = w.blocks <= 1 || w.block % (k.group * w.p) == 0;
      if (w.n == int64_t{1} << k.bits && w.p == k.p && fits) kernel = &k;
    }
    if (kernel != nullptr) {
      permuted = true;
      step_codes = int64_t{kernel->group} * W;
      step_width = step_codes * w.p;
      steps = (w.count + step_codes - 1) / step_codes;
      width = steps * step_width;
      tile = std::max<int64_t>(1, kTileWidth / step_width);
      lanes = w.blocks > 1;
      x_floats = job.batch * width;
      table_floats = lanes ? steps * (W + 1) : 0;
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
  return plan.x_floats + plan.table_floats;
}

#if TORCHLIN_ISA_BYTES >= 32
// The first block of each step, and which from there on a lane's codes belong to.
inline grid::PermutePlan permute_plan(const Plan& plan, const float* ready) {
  if (!plan.lanes) return {plan.steps, nullptr, nullptr};
  const int32_t* lane = reinterpret_cast<const int32_t*>(ready + plan.x_floats);
  return {plan.steps, lane + plan.steps * kW, lane};
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
inline constexpr int64_t kBlockRows = 64;  // of the weight, in L2 while x goes by

// sums[b * kBlockRows + r] += a row of the tile times one of x, over `width` floats.
template <int B>
void multiply_tile(const float* tile, int64_t tile_step, const float* x, int64_t x_step, int64_t width, float* sums) {
  constexpr int W = kLanes<float>, R = kTileRows;
  V<float> acc[R][B] = {};
  for (int64_t i = 0; i < width; i += W) {
    V<float> rows[R];
    unroll<R>([&](int r) __attribute__((always_inline)) { rows[r] = load(tile + r * tile_step + i); });
    unroll<B>([&](int b) __attribute__((always_inline)) {
      const V<float> xv = load(x + b * x_step + i);
      unroll<R>([&](int r) __attribute__((always_inline)) { acc[r][b] += rows[r] * xv; });
    });
  }
  unroll<B>([&](int b) __attribute__((always_inline)) {
    unroll<R>([&](int r) __attribute__((always_inline)) { sums[b * kBlockRows + r] += sum_lanes(acc[r][b]); });
  });
}

inline constexpr auto kMultiply = std::array{&multiply_tile<1>, &multiply_tile<2>, &multiply_tile<3>,
                                             &multiply_tile<4>, &multiply_tile<5>, &multiply_tile<6>};

template <class T>
void linear_rows(const grid::Linear& job, int64_t begin, int64_t end) {
  const grid::Weight& w = job.weight;
  const Plan plan(job);
  const float* table = plan.table_floats > 0 ? job.ready + plan.x_floats : w.grid;
  const auto put = [&](int64_t b, int64_t r, float sum) {
    const float bias = job.bias == nullptr ? 0 : load_one(static_cast<const T*>(job.bias) + r);
    store_one(static_cast<T*>(job.y) + b * w.out + r, sum + bias);
  };
#if TORCHLIN_ISA_BYTES >= 32
  const grid::PermutePlan permute = permute_plan(plan, job.ready);
#endif
  if (job.batch == 1) {
    constexpr int64_t kRows = 256;
    float y[kRows];
    for (int64_t r = begin; r < end; r += kRows) {
      const int64_t last = std::min(end, r + kRows);
#if TORCHLIN_ISA_BYTES >= 32
      if (plan.permuted) {
        plan.kernel->gemv(job, permute, y - r, r, last);
      } else
#endif
        switch (grid::table_step(w.p)) {
          case 1: lookup_gemv<1>(job, table, y - r, r, last); break;
          case 4: lookup_gemv<4>(job, table, y - r, r, last); break;
          default: lookup_gemv<8>(job, table, y - r, r, last);
        }
      for (int64_t i = r; i < last; ++i) put(0, i, y[i - r]);
    }
    return;
  }

  const int64_t tile_width = plan.permuted ? plan.tile * plan.step_width : (plan.step_width + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  const int64_t tile_step = tile_width + kCopySlack + kLanes<float>;
  float* weights = grid::Scratch::get<float>(grid::Purpose::kWeights, kBlockRows * tile_step);
  float* sums = grid::Scratch::get<float>(grid::Purpose::kSums, job.batch * kBlockRows);
  uint16_t* codes = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, kLookupRows * kCodesAtATime + plan.step_codes);
  const int64_t groups = (job.batch + kTileBatch - 1) / kTileBatch;
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - r), whole = (rows + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t i = 0; i < job.batch * kBlockRows; ++i) sums[i] = 0;
    for (int64_t s = 0; s < plan.steps; s += plan.tile) {
      const int64_t until = std::min(plan.steps, s + plan.tile);
      const float* x = job.ready + s * plan.step_width;
      int64_t width = (until - s) * plan.step_width;
      if (!plan.permuted) {
        const int64_t size = std::min(plan.step_codes, w.count - s * plan.step_codes);
        width = (size * w.p + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
        for (int64_t i = 0; i < rows; ++i) {
          float* to = weights + i * tile_step;
          points_of_row(w, r + i, s * plan.step_codes, size, table, codes, to);
          apply_scales(w, r + i, s * plan.step_width, std::min(w.in, s * plan.step_width + size * w.p), to);
          for (int64_t l = std::min(w.in - s * plan.step_width, size * w.p); l < width; ++l) to[l] = 0;
        }
      } else {
#if TORCHLIN_ISA_BYTES >= 32
        for (int64_t i = 0; i < rows; ++i) plan.kernel->weights(w, permute, r + i, s, until, weights + i * tile_step);
#endif
      }
      for (int64_t i = rows; i < whole; ++i) std::memcpy(weights + i * tile_step, weights, static_cast<size_t>(width) * 4);
      for (int64_t g = 0, b = 0; g < groups; ++g) {
        const int64_t size = (job.batch - b + groups - g - 1) / (groups - g);
        for (int64_t i = 0; i < whole; i += kTileRows) {
          kMultiply[static_cast<size_t>(size - 1)](weights + i * tile_step, tile_step, x + b * plan.width, plan.width, width,
                                                   sums + b * kBlockRows + i);
        }
        b += size;
      }
    }
    for (int64_t b = 0; b < job.batch; ++b) {
      for (int64_t i = 0; i < rows; ++i) put(b, r + i, sums[b * kBlockRows + i]);
    }
  }
}

template <class T>
constexpr grid::LinearKernel linear_kernel_of() {
  return {&linear_prepared, &linear_prepare<T>, &linear_rows<T>};
}
