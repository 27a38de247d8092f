// Which kernels an op of this family launches, with what grid and shared memory: free of torch, so that the tests plan as
// op.cu does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "grid/kernel_codes.cuh"
#include "grid/kernel_gemv.cuh"
#include "grid/kernel_mma.cuh"
#include "grid/layout.h"

namespace torchlin::grid {

struct Device {
  int multiprocessors;
  size_t shared_per_block;  // with the opt-in
};

namespace detail {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int power_of_two_above(int v) { return v <= 1 ? 1 : v <= 2 ? 2 : v <= 4 ? 4 : 8; }

}  // namespace detail

inline int64_t bytes_of_row(int64_t n, int64_t count) { return row_bytes_of(layout_of(n), count); }

namespace detail {

inline unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kCodeThreads);
  if (blocks > 0x7fffffff) throw std::invalid_argument("torchlin: more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

inline void check_row(int64_t row_bytes, int64_t numbers) {
  if (row_bytes >= int64_t{1} << 28 || numbers >= int64_t{1} << 30)
    throw std::invalid_argument("torchlin: a row of codes is limited to 256 MiB");
}

// Segments of up to four words.
inline Rows rows_of(const void* data, int64_t row_bytes, Layout layout, int64_t n) {
  const int words = layout.width <= 16 ? 4 : layout.width <= 32 ? 2 : 1;
  return {static_cast<const uint8_t*>(data), row_bytes, layout.width, layout.digits, words,
          Radix(static_cast<uint32_t>(n))};
}

template <class F>
void with_coordinates(int count, F&& f) {
  switch (count) {
    case 1: return f(constant<1>{});
    case 2: return f(constant<2>{});
    case 4: return f(constant<4>{});
    default: return f(constant<8>{});
  }
}

}  // namespace detail

// In each of these, launch(kernel, grid x, grid y, threads, shared bytes, arguments) is called once, or not for nothing.

template <class Launcher>
void run_encode(Encode a, Launcher&& launch) {
  a.vectors = detail::ceil_div(a.k, a.p);
  if (a.rows * a.vectors == 0) return;
  const int coordinates = detail::power_of_two_above(a.p);
  const size_t point = static_cast<size_t>(coordinates) * sizeof(float);
  a.tile = static_cast<int>(std::min<size_t>(static_cast<size_t>(a.n), 32768 / point));
  detail::with_coordinates(coordinates, [&](auto p) {
    launch(grid_encode<p.value>, detail::blocks_for(a.rows * a.vectors), 1u, kCodeThreads, a.tile * point, a);
  });
}

template <class Launcher>
void run_decode(const Decode& a, Launcher&& launch) {
  if (a.count > 0) launch(grid_decode, detail::blocks_for(a.count * a.p), 1u, kCodeThreads, size_t{0}, a);
}

inline Pack pack_of(const void* codes, const void* packed, int64_t rows, int64_t count, int64_t n) {
  const Layout layout = layout_of(n);
  Pack a{};
  a.codes = const_cast<void*>(codes), a.packed = static_cast<uint8_t*>(const_cast<void*>(packed));
  a.rows = rows, a.count = count, a.words = detail::ceil_div(count, layout.digits);
  a.row_bytes = bytes_of_row(n, count);
  a.width = layout.width, a.digits = layout.digits, a.radix = Radix(static_cast<uint32_t>(n));
  detail::check_row(a.row_bytes, 0);
  return a;
}
template <class Launcher>
void run_pack(const Pack& a, Launcher&& launch) {
  const int64_t threads = a.rows * detail::ceil_div(a.words, 8);
  if (threads > 0) launch(grid_pack, detail::blocks_for(threads), 1u, kCodeThreads, size_t{0}, a);
}
template <class Launcher>
void run_unpack(const Pack& a, Launcher&& launch) {
  const int64_t threads = a.rows * a.words;
  if (threads > 0) launch(grid_unpack, detail::blocks_for(threads), 1u, kCodeThreads, size_t{0}, a);
}

// What a weight of packed codes is, beside x.
struct Weight {
  const void* packed;
  const void* scales;
  const float* grid;
  bool half_scales;
  int64_t n, p, out_features, in_features, block_size;

  int64_t blocks() const { return std::max<int64_t>(1, detail::ceil_div(in_features, block_size)); }
  int64_t codes() const { return detail::ceil_div(in_features, p); }
};

// Rows [first, first + count) of W' into `out`.
template <class Launcher>
void run_dequantize(const Weight& w, int64_t first, int64_t count, Type type, void* out, Launcher&& launch) {
  if (count == 0 || w.in_features == 0) return;
  Dequantize a{};
  a.rows = detail::rows_of(w.packed, bytes_of_row(w.n, w.codes()), layout_of(w.n), w.n);
  detail::check_row(a.rows.row_bytes, w.in_features);
  a.grid = w.grid, a.scales = w.scales, a.out = out, a.type = type, a.half_scales = w.half_scales;
  a.first_row = first, a.row_count = count;
  a.in_features = static_cast<int>(w.in_features), a.n = static_cast<int>(w.n), a.p = static_cast<int>(w.p);
  a.blocks = static_cast<int>(w.blocks());
  a.block_size = static_cast<int>(std::min(w.block_size, w.in_features));
  a.segments = static_cast<int>(detail::ceil_div(w.codes(), a.rows.words * a.rows.digits));
  a.vectors = a.rows.words * a.rows.digits * a.p % 4 == 0 && w.in_features % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto go = [&](auto kernel) {
    launch(kernel, detail::blocks_for(count * a.segments), 1u, kCodeThreads, size_t{0}, a);
  };
  switch (a.p) {
    case 1: return go(grid_dequantize<1>);
    case 2: return go(grid_dequantize<2>);
    case 4: return go(grid_dequantize<4>);
    case 8: return go(grid_dequantize<8>);
    default: return go(grid_dequantize<0>);
  }
}

// ---- the linear layer

enum class Path { gemv, mma, dense };  // dense: dequantize, and torch multiplies

struct Plan {
  Path path;
  Source source;
  int coordinates;  // of an entry
  int columns;      // rows of x of a block
  Tiling tiling;    // of grid_mma
  bool pad;         // the table in global memory is to be copied by grid_pad
  unsigned grid_x, grid_y;
  size_t shared_bytes;
  int64_t workspace;  // floats: the copied table, or sums of parts
  Linear linear;      // but for the workspace
};

// Rows of x from which making the weight costs less than reading codes again for every few rows: by benchmarks/gpu_model_grid.py.
inline constexpr int64_t kDenseFloat = 48, kDenseMma = 192, kDenseOther = 16;
inline constexpr int64_t kSmallWeight = int64_t{1} << 16;
inline constexpr int64_t kDenseBytes = int64_t{16} << 20;  // of weight at a time: it stays in the cache for torch

class Planner {
 public:
  Planner(const Weight& w, const void* x, const void* bias, void* y, Type type, int64_t batch, const Device& device)
      : w_(w), device_(device), layout_(layout_of(w.n)) {
    Linear& a = plan_.linear;
    a.x = x, a.scales = w.scales, a.bias = bias, a.y = y, a.type = type, a.half_scales = w.half_scales;
    detail::check_row(bytes_of_row(w.n, w.codes()), w.in_features);
    if (batch >= int64_t{1} << 30 || w.out_features >= int64_t{1} << 30)
      throw std::invalid_argument("torchlin: more than 2^30 rows");
    a.parts = 1;
    a.batch = static_cast<int>(batch), a.in_features = static_cast<int>(w.in_features);
    a.out_features = static_cast<int>(w.out_features);
    a.blocks = static_cast<int>(w.blocks());
    a.block_size = static_cast<int>(std::clamp<int64_t>(w.block_size, 1, std::max<int64_t>(w.in_features, 1)));
    const bool wide_type = type == Type::f32;
    // Tensor cores round the points of the grid to 16 bits: not where there is nothing to be gained.
    const bool worthwhile = batch > 4 || w.in_features * w.out_features >= kSmallWeight;
    if (!wide_type && worthwhile && batch <= kDenseMma && w.in_features > 0 && plan_mma()) return;
    const int64_t dense = wide_type ? kDenseFloat : kDenseOther;
    if (batch > dense && w.in_features > 0) {
      plan_.path = Path::dense;
      return;
    }
    plan_gemv();
  }

  const Plan& take() const { return plan_; }

 private:
  static constexpr size_t kTableBytes = size_t{64} << 10;
  static constexpr int kMostParts = 8;

  // An entry of the table as several codes, where that gives at most 4 coordinates in at most 512 entries.
  void set_table(bool compose) {
    Linear& a = plan_.linear;
    const int p = static_cast<int>(w_.p);
    const auto whole_in_block = [&](int codes) { return a.blocks == 1 || a.block_size % (codes * p) == 0; };
    a.table = {w_.grid, static_cast<int>(w_.n), p, 1, Radix(static_cast<uint32_t>(w_.n)), 0, 0};
    a.rows = detail::rows_of(w_.packed, bytes_of_row(w_.n, w_.codes()), layout_, w_.n);
    if (layout_.digits == 1) {
      int codes = 1;
      while (compose && 2 * codes * layout_.width <= 8 && 2 * codes * p <= 4 && whole_in_block(2 * codes)) codes *= 2;
      a.table.codes = codes, a.table.radix = Radix(1u << layout_.width);
      a.rows.width = codes * layout_.width;
      a.table.entries = 1 << a.rows.width;
    } else if (compose && layout_.width <= 9 && layout_.digits * p <= 4 && whole_in_block(layout_.digits)) {
      a.table.codes = layout_.digits, a.rows.digits = 1;
      a.table.entries = 1 << a.rows.width;
    } else {
      a.table.entries = static_cast<int>(w_.n);
    }
    plan_.coordinates = detail::power_of_two_above(a.table.codes * p);
  }

  int weights_of_lookup() const { return plan_.linear.table.codes * plan_.linear.table.p; }

  // Whether rows can be read 16 bytes of 8-bit codes at a time, none of which reaches over the end of a block.
  bool wide() const {
    const Linear& a = plan_.linear;
    return a.rows.width == 8 && a.rows.digits == 1 && plan_.coordinates <= 4 && a.rows.row_bytes % 16 == 0 &&
           reinterpret_cast<uintptr_t>(w_.packed) % 16 == 0 &&
           (a.blocks == 1 || a.block_size % (kWideCodes * weights_of_lookup()) == 0);
  }

  // The widest stride for entries of `words`, at most 32, that `bytes` have room for; -1 if there is none.
  int log_stride(int words, size_t bytes) const {
    const size_t entries = static_cast<size_t>(plan_.linear.table.entries);
    int log = words == 1 ? 0 : words == 2 ? 1 : words == 4 ? 2 : 3;
    if ((entries * 4 << log) > bytes) return -1;
    if (entries << log <= 32) return log;  // every entry has a bank of its own
    while (log < 5 && (entries * 4 << (log + 1)) <= bytes) ++log;
    return log;
  }

  // The largest power of two that is at most `limit` and leaves a warp nothing to wait for: groups of rows times it fill the
  // device's warps by three quarters.
  static int splits_of(int64_t groups, int64_t warps, int limit) {
    int splits = 1;
    while (2 * splits <= limit && groups * splits * 4 < warps * 3) splits *= 2;
    return splits;
  }

  bool plan_mma() {
    Linear& a = plan_.linear;
    set_table(true);
    if (plan_.coordinates > 4) return false;
    const int words_of_entry = plan_.coordinates == 4 ? 2 : 1;
    plan_.source = wide() ? Source::wide : Source::shared;
    int lookups = kWideCodes;
    if (plan_.source == Source::shared) {
      while (a.blocks > 1 && a.rows.words > 1 && a.block_size % (a.rows.words * a.rows.digits * weights_of_lookup()) != 0)
        a.rows.words /= 2;
      lookups = a.rows.words * a.rows.digits;
      if (a.blocks > 1 && a.block_size % (lookups * weights_of_lookup()) != 0) return false;
    }
    a.table.log_stride = log_stride(words_of_entry, std::min(kTableBytes, device_.shared_per_block / 3));
    if (a.table.log_stride < 0 || (plan_.source == Source::wide && a.table.log_stride != 5)) return false;
    const size_t table = static_cast<size_t>(a.table.entries) * 4 << a.table.log_stride;
    const int pieces = static_cast<int>(detail::ceil_div(lookups * plan_.coordinates, 4));
    const int64_t lookups_of_row = detail::ceil_div(w_.codes(), a.table.codes);
    a.segments = static_cast<int>(detail::ceil_div(lookups_of_row, lookups));
    const int of_block = a.blocks == 1 ? a.segments : a.block_size / (lookups * weights_of_lookup());
    a.steps = static_cast<int>(detail::ceil_div(of_block, 4)) * a.blocks;

    for (const Tiling tiling : {Tiling::broad, a.blocks == 1 ? Tiling::tall : Tiling::blocks, Tiling::narrow}) {
      if (tiling == Tiling::broad && (a.batch <= 32 || a.blocks > 1)) continue;
      if (tiling != Tiling::narrow && a.batch <= 8) continue;
      const int rows = 16 * (tiling == Tiling::tall ? kMmaTiles<Tiling::tall> : kMmaTiles<Tiling::broad>);
      const int columns = tiling == Tiling::narrow  ? kMmaColumns<Tiling::narrow>
                          : tiling == Tiling::broad ? kMmaColumns<Tiling::broad>
                                                    : kMmaColumns<Tiling::tall>;
      const size_t sums = static_cast<size_t>(kMmaWarps * sums_of_warp(columns, rows)) * 4;
      const auto x_bytes = [&](int steps) { return static_cast<size_t>(columns * staged_row(steps, pieces)) * 4; };
      const size_t room = std::min(device_.shared_per_block - table, std::max(sums, size_t{144} << 10));
      if (sums > room || x_bytes(1) > room) continue;
      a.chunk = 1;
      while (a.chunk < a.steps && x_bytes(a.chunk + 1) <= room) ++a.chunk;
      const int64_t groups = detail::ceil_div(a.out_features, rows), warps = int64_t{device_.multiprocessors} * kMmaWarps;
      // Blocks read all of x for their rows: many rows of x are divided among blocks first.
      const int most_parts = tiling == Tiling::narrow ? 1 : kMostParts;
      while (2 * a.parts <= std::min(most_parts, a.steps) && groups * a.parts * 4 < warps * 3) a.parts *= 2;
      a.chunk = std::min(a.chunk, static_cast<int>(detail::ceil_div(a.steps, a.parts)));
      a.splits = splits_of(groups * a.parts, warps, std::min(kMmaWarps, a.chunk));
      plan_.path = Path::mma, plan_.tiling = tiling, plan_.columns = columns;
      // With parts, as few blocks as hold all rows; else every multiprocessor gets its share.
      const int64_t blocks = a.parts > 1 ? detail::ceil_div(groups * a.splits, kMmaWarps) : groups;
      plan_.grid_x = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, device_.multiprocessors));
      plan_.grid_y = static_cast<unsigned>(detail::ceil_div(a.batch, columns) * a.parts);
      if (a.parts > 1) plan_.workspace = a.parts * int64_t{a.batch} * a.out_features;
      plan_.shared_bytes = table + std::max(x_bytes(a.chunk), sums);
      return true;
    }
    return false;
  }

  void plan_gemv() {
    Linear& a = plan_.linear;
    plan_.path = Path::gemv;
    const size_t limit = device_.shared_per_block;
    set_table(true);
    plan_.source = wide() ? Source::wide : Source::shared;
    a.table.log_stride = log_stride(plan_.coordinates, std::min(kTableBytes, limit / 2));
    if (a.table.log_stride < 0) a.table.log_stride = log_stride(plan_.coordinates, limit / 5 * 4);  // once, if that fits
    if (a.table.log_stride < 0) plan_.source = Source::global;
    if (plan_.source == Source::wide && a.table.log_stride != 5) plan_.source = Source::shared;
    const bool global = plan_.source == Source::global;
    plan_.pad = global && (plan_.coordinates != w_.p || reinterpret_cast<uintptr_t>(w_.grid) % 16 != 0);
    if (plan_.pad) plan_.workspace = w_.n * plan_.coordinates;
    const size_t table = global ? 0 : static_cast<size_t>(a.table.entries) * 4 << a.table.log_stride;
    const int lookups = plan_.source == Source::wide ? kWideCodes : a.rows.words * a.rows.digits;
    a.segments = static_cast<int>(detail::ceil_div(detail::ceil_div(w_.codes(), a.table.codes), lookups));
    a.steps = static_cast<int>(detail::ceil_div(a.segments, 32));
    a.fine = a.blocks > 1 && a.block_size % (lookups * weights_of_lookup()) != 0;

    const size_t step = static_cast<size_t>(lookups) * 32 * static_cast<size_t>(plan_.coordinates) * 4;
    for (const int b : {8, 4, 1}) {
      const bool there = b == 1 || (b == 4 ? !global : global || plan_.coordinates < 8);
      if (!there || (b == 8 && a.batch <= (global ? 1 : 4)) || (b == 4 && a.batch == 1)) continue;
      const size_t sums = static_cast<size_t>(kGemvWarps * kGemvRows * b) * 4, step_bytes = step * static_cast<size_t>(b);
      if (table + step_bytes + sums > limit) continue;
      const size_t wanted = std::max(step_bytes, size_t{b == 1 ? 32u << 10 : 64u << 10});
      a.chunk = static_cast<int>(std::clamp<size_t>(std::min(wanted, limit - table - sums) / step_bytes, 1,
                                                    static_cast<size_t>(std::max(a.steps, 1))));
      plan_.columns = b, plan_.shared_bytes = table + step_bytes * static_cast<size_t>(a.chunk) + sums;
      // Every block has 1 KiB to itself beside what it asks for.
      const int64_t resident = std::min<int64_t>(kGemvBlocks, (limit + 1024) / (plan_.shared_bytes + 1024));
      const int64_t groups = detail::ceil_div(a.out_features, kGemvRows), blocks = resident * device_.multiprocessors;
      a.splits = splits_of(groups, blocks * kGemvWarps, std::min(kGemvWarps, a.chunk));
      plan_.grid_x = static_cast<unsigned>(std::clamp<int64_t>(groups, 1, blocks));
      plan_.grid_y = static_cast<unsigned>(detail::ceil_div(a.batch, b));
      return;
    }
    throw std::invalid_argument("torchlin: this grid does not fit the device's shared memory");
  }

  const Weight& w_;
  const Device& device_;
  const Layout layout_;
  Plan plan_{};
};

namespace detail {

template <int P, int B, class Launcher>
void run_gemv(const Plan& plan, Launcher&& launch) {
  const auto go = [&](auto kernel) {
    launch(kernel, plan.grid_x, plan.grid_y, kGemvThreads, plan.shared_bytes, plan.linear);
  };
  if constexpr (P <= 4) {
    if (plan.source == Source::wide) return go(grid_gemv<P, B, Source::wide>);
  }
  if constexpr (B != 4) {
    if (plan.source == Source::global) return go(grid_gemv<P, B, Source::global>);
  }
  if constexpr (P < 8 || B < 8) return go(grid_gemv<P, B, Source::shared>);  // registers do not suffice for both
}

template <int P, Tiling T, class Launcher>
void run_mma(const Plan& plan, Launcher&& launch) {
  const auto go = [&](auto kernel) {
    launch(kernel, plan.grid_x, plan.grid_y, kMmaThreads, plan.shared_bytes, plan.linear);
  };
  if (plan.source == Source::wide) go(grid_mma<P, T, true>);
  else go(grid_mma<P, T, false>);
}

}  // namespace detail

// Launches the kernels of a plan that is not dense.
template <class Launcher>
void run_linear(Plan plan, float* workspace, Launcher&& launch) {
  Linear& a = plan.linear;
  if (plan.pad) {
    launch(grid_pad, detail::blocks_for(int64_t{a.table.n} * plan.coordinates), 1u, kCodeThreads, size_t{0},
           Pad{a.table.grid, workspace, a.table.n, a.table.p, plan.coordinates});
    a.table.grid = workspace;
  } else {
    a.partial = workspace;
  }
  detail::with_coordinates(plan.coordinates, [&](auto p) {
    constexpr int P = decltype(p)::value;
    if (plan.path == Path::gemv) {
      if (plan.columns == 1) detail::run_gemv<P, 1>(plan, launch);
      else if (plan.columns == 4) detail::run_gemv<P, 4>(plan, launch);
      else detail::run_gemv<P, 8>(plan, launch);
    } else if constexpr (P <= 4) {
      if (plan.tiling == Tiling::narrow) detail::run_mma<P, Tiling::narrow>(plan, launch);
      else if (plan.tiling == Tiling::broad) detail::run_mma<P, Tiling::broad>(plan, launch);
      else if (plan.tiling == Tiling::tall) detail::run_mma<P, Tiling::tall>(plan, launch);
      else detail::run_mma<P, Tiling::blocks>(plan, launch);
    }
  });
  if (a.parts > 1) {
    const int64_t blocks = detail::ceil_div(int64_t{a.batch} * a.out_features, kMmaThreads);
    launch(grid_add, static_cast<unsigned>(blocks), 1u, kMmaThreads, size_t{0}, a);
  }
}

}  // namespace torchlin::grid
