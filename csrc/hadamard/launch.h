// Which kernels a transform launches, with what grid and shared memory: free of torch, so that the tests plan
// as op.cu does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "hadamard/kernel_rows.cuh"
#include "hadamard/kernel_tile.cuh"

namespace torchlin::hadamard {

enum class Type { f32, f64, f16, bf16 };
enum class Buffer { x, y, workspace };

inline size_t size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }
inline bool is_16_bit(Type t) { return t == Type::f16 || t == Type::bf16; }

struct Device {
  int multiprocessors;
  size_t shared_per_block;  // with the opt-in
};

// The arguments of the raw op, as sizes, strides and addresses.
struct Transform {
  Type type;
  std::vector<int64_t> sizes, x_strides, y_strides;
  int dim;
  int64_t order, K;
  uintptr_t x, y, signs;  // addresses, for their alignment; signs is 0 for none
  bool transpose;
};

// An axis of the iteration space, with its strides in x, y, the workspace and the signs.
struct Axis {
  int64_t size, x, y, w, signs;
};

struct Step {
  bool by_rows;  // fwht_rows, else fwht_tile
  bool mma, prefetch;
  int log_order;  // of fwht_rows
  Type from_type, to_type;
  Buffer from, to;
  int64_t from_offset, to_offset, sign_offset;  // elements
  bool has_pre, has_post, last;
  Operands<float> rows;      // by_rows: everything but the pointers and the scale
  TileOperands<float> tile;  // else; the same fields serve double
  unsigned grid;
  int threads;
  size_t shared_bytes;
};

struct Plan {
  std::vector<Step> steps;
  int64_t workspace_elements = 0;  // floats
};

namespace detail {

inline int log2_floor(int64_t v) {
  int b = 0;
  while (v >> (b + 1)) ++b;
  return b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(RowsPlan{}) for run-time arguments. 16-bit types: W = 3, with or without mma; float: W = 2.
template <int W, bool Mma, class F, int L = Mma ? kMinMmaBits : 0>
void with_rows_plan(int log_order, F&& f) {
  if constexpr (L <= kMaxRowBits) {
    if (log_order == L) return f(RowsPlan<L, W, Mma>{});
    with_rows_plan<W, Mma, F, L + 1>(log_order, std::forward<F>(f));
  } else {
    throw std::logic_error("torchlin: no row kernel of this order");
  }
}

// Axes that are one in memory become one; axes of size 1 go.
inline std::vector<Axis> merge(std::vector<Axis> axes) {
  std::vector<Axis> out;
  for (const Axis& a : axes) {
    if (a.size == 1) continue;
    if (!out.empty()) {
      Axis& b = out.back();
      if (a.x == b.x * b.size && a.y == b.y * b.size && a.w == b.w * b.size && a.signs == b.signs * b.size) {
        b.size *= a.size;
        continue;
      }
    }
    out.push_back(a);
  }
  return out;
}

inline int64_t stride_in(const Axis& a, Buffer b) {
  return b == Buffer::x ? a.x : b == Buffer::y ? a.y : a.w;
}

}  // namespace detail

class Planner {
 public:
  Planner(const Transform& t, const Device& device) : t_(t), device_(device) {
    if (std::any_of(t.sizes.begin(), t.sizes.end(), [](int64_t s) { return s == 0; })) return;
    const int64_t n = t.order, n2 = n / t.K;
    Axis axis{n, t.x_strides[t.dim], t.y_strides[t.dim], 1, t.signs ? 1 : 0};
    std::vector<Axis> batch;
    const int64_t blocks = t.sizes[t.dim] / n;
    batch.push_back({blocks, n * axis.x, n * axis.y, 0, t.signs ? n : 0});
    for (size_t d = 0; d < t.sizes.size(); ++d) {
      if (static_cast<int>(d) != t.dim) batch.push_back({t.sizes[d], t.x_strides[d], t.y_strides[d], 0, 0});
    }
    std::stable_sort(batch.begin(), batch.end(), [](const Axis& a, const Axis& b) { return a.y < b.y; });

    const int log_n2 = detail::log2_floor(n2);
    const auto held = static_cast<int64_t>(accumulator_bytes());
    // A strided axis is read by columns: fewer than 8 side by side would waste most of every memory sector.
    const bool by_columns = axis.x != 1 && axis.y != 1 &&
                            std::any_of(batch.begin(), batch.end(),
                                        [](const Axis& a) { return a.size >= 8 && a.x == 1 && a.y == 1; });
    const int64_t wanted = n * held * (by_columns && log_n2 > 0 && n > kColumnOrder ? 8 : 1);
    const bool one_block = static_cast<size_t>(wanted) + 128 + table_bytes(t.K) <= device.shared_per_block;
    if (one_block || by_rows(axis, log_n2, t.K == 1 ? 1 : 0, false)) {
      add(axis, t.K, log_n2, batch, Buffer::x, Buffer::y, true, true);
      return;
    }
    // H_n = (H_K (x) H_a) (x) H_b (x) ...: one pass a factor, slowest first, the others along for the ride.
    std::vector<std::pair<int64_t, int>> factors;  // K and log2 of the power of two
    int left = log_n2;
    std::vector<int> lower;
    const auto take_lower = [&](int bits) { lower.push_back(bits), left -= bits; };
    if (left > 0) take_lower(std::min(left, kLastBits));
    while ((t.K << left) > kColumnOrder && left > 0) take_lower(std::min(left, kColumnBits));
    if (t.K > 1 || left > 0) factors.push_back({t.K, left});
    for (size_t i = lower.size(); i-- > 0;) factors.push_back({1, lower[i]});

    // The workspace is dense in the order of y, with the transformed axis in its place.
    const bool needs_workspace = is_16_bit(t.type);
    if (needs_workspace) plan_.workspace_elements = lay_out_workspace(axis, batch);
    Buffer from = Buffer::x;
    int64_t below = n;
    for (size_t i = 0; i < factors.size(); ++i) {
      const int64_t size = factors[i].first << factors[i].second, above = n / below;
      below /= size;
      const bool first = i == 0, last = i + 1 == factors.size();
      const Buffer to = last ? Buffer::y : needs_workspace ? Buffer::workspace : Buffer::y;
      const auto part = [&](int64_t count, int64_t scale) {
        return Axis{count, axis.x * scale, axis.y * scale, axis.w * scale, axis.signs * scale};
      };
      std::vector<Axis> others;
      others.push_back(part(below, 1));
      others.push_back(part(above, below * size));
      others.insert(others.end(), batch.begin(), batch.end());
      add(part(size, below), factors[i].first, factors[i].second, others, from, to, first, last);
      from = to;
    }
  }

  Plan take() { return std::move(plan_); }

 private:
  static constexpr int kLastBits = 12, kColumnBits = 12;
  static constexpr int64_t kColumnOrder = 4096;

  size_t accumulator_bytes() const { return t_.type == Type::f64 ? 8 : 4; }
  static size_t table_bytes(int64_t K) {
    return K == 1 ? 0 : 4 * sign_words(static_cast<int>(K)) * padded_rows(static_cast<int>(K)) + 128 + 16;
  }

  // Orders beyond the last that a multi-pass transform needs are not instantiated from float to 16 bits.
  bool by_rows(const Axis& axis, int log_n, int64_t K, bool widened) const {
    return K == 1 && t_.type != Type::f64 && axis.x == 1 && axis.y == 1 && log_n <= kMaxRowBits &&
           (!widened || log_n == kLastBits) && row_shared_bytes(log_n, false) <= device_.shared_per_block;
  }
  size_t row_shared_bytes(int log_n, bool mma) const {
    size_t bytes = 0;
    const auto take = [&](auto plan) { bytes = decltype(plan)::kExchangeBytes; };
    if (!is_16_bit(t_.type)) detail::with_rows_plan<2, false>(log_n, take);
    else if (mma) detail::with_rows_plan<3, true>(log_n, take);
    else detail::with_rows_plan<3, false>(log_n, take);
    return bytes;
  }

  int64_t lay_out_workspace(Axis& axis, std::vector<Axis>& batch) const {
    // Everything that is faster than the axis in y stays so; the axis' own blocks count as such an axis.
    std::vector<Axis*> all{&axis};
    for (Axis& a : batch) all.push_back(&a);
    std::stable_sort(all.begin(), all.end(), [](const Axis* a, const Axis* b) { return a->y < b->y; });
    int64_t step = 1;
    for (Axis* a : all) {
      a->w = step;
      step *= a->size;
    }
    return step;
  }

  // One pass of `axis` = K * 2^log_n2 over all `others`.
  void add(const Axis& axis, int64_t K, int log_n2, std::vector<Axis> others, Buffer from, Buffer to,
           bool first, bool last) {
    using detail::stride_in;
    const auto effective = [&](const Axis& a) {
      return Axis{a.size, stride_in(a, from), stride_in(a, to), 0, a.signs};
    };
    const Axis ax = effective(axis);
    for (Axis& a : others) a = effective(a);
    std::stable_sort(others.begin(), others.end(),
                     [](const Axis& a, const Axis& b) { return std::max(a.x, a.y) < std::max(b.x, b.y); });
    others = detail::merge(others);

    Step s{};
    s.from = from, s.to = to, s.last = last;
    s.from_type = from == Buffer::workspace ? Type::f32 : t_.type;
    s.to_type = to == Buffer::workspace ? Type::f32 : t_.type;
    s.has_pre = first && t_.signs && !t_.transpose;
    s.has_post = last && t_.signs && t_.transpose;
    const bool widened = s.from_type != s.to_type;
    s.by_rows = (!widened || last) && by_rows(ax, log_n2, K, widened);

    Axis columns{1, 0, 0, 0, 0};
    if (!s.by_rows && !(ax.x == 1 && ax.y == 1)) {
      // The axis that is contiguous on both sides, or else on one.
      for (const int wanted : {2, 1}) {
        const auto it = std::find_if(others.begin(), others.end(),
                                     [&](const Axis& a) { return (a.x == 1) + (a.y == 1) == wanted; });
        if (it == others.end()) continue;
        columns = *it;
        others.erase(it);
        break;
      }
    }
    if (others.empty()) others.push_back({1, 0, 0, 0, 0});
    // What does not fit a RowMap is looped over here: tensors of so many separate axes are rare.
    std::vector<Axis> outer;
    while (others.size() > kMaxDims) {
      outer.push_back(others.back());
      others.pop_back();
    }
    RowMap map{};
    map.ndim = static_cast<int>(others.size());
    int64_t rows = 1;
    for (int d = 0; d < map.ndim; ++d) {
      map.size[d] = others[d].size, map.x[d] = others[d].x, map.y[d] = others[d].y,
      map.signs[d] = others[d].signs;
      rows *= others[d].size;
    }
    // Vectors that cross rows take them to lie a fixed stride apart.
    if (map.ndim > 1 && (int64_t{1} << log_n2) < kVectorBytes / static_cast<int64_t>(size_of(s.from_type)))
      s.by_rows = false;
    Operands<float> op{};
    op.rows = rows, op.map = map;
    op.x_stride = ax.x, op.y_stride = ax.y, op.sign_stride = ax.signs;
    const auto strides_allow = [&](int64_t vector, auto stride) {
      return std::all_of(others.begin(), others.end(),
                         [&](const Axis& a) { return a.size == 1 || stride(a) % vector == 0; }) &&
             std::all_of(outer.begin(), outer.end(), [&](const Axis& a) { return stride(a) % vector == 0; });
    };
    const int64_t run = K == 1 ? ax.size : ax.size / K;  // contiguous elements of the tile along the axis
    const auto vectors = [&](Buffer b, Type type, int64_t axis_stride, auto stride) {
      const uintptr_t address = b == Buffer::x ? t_.x : b == Buffer::y ? t_.y : 0;
      const int64_t vector = kVectorBytes / static_cast<int64_t>(size_of(type));
      if (address % kVectorBytes || axis_stride != 1) return false;
      if (run >= vector) return strides_allow(vector, stride);
      // A vector across several rows: they must follow one another without a gap.
      return s.by_rows && others.size() == 1 && (others[0].size == 1 || stride(others[0]) == run) &&
             outer.empty();
    };
    op.x_vector = vectors(from, s.from_type, ax.x, [](const Axis& a) { return a.x; });
    op.y_vector = vectors(to, s.to_type, ax.y, [](const Axis& a) { return a.y; });
    op.sign_vector =
        t_.signs % kVectorBytes == 0 && run >= 4 && strides_allow(4, [](const Axis& a) { return a.signs; });

    if (columns.size > 1) op.x_vector = op.y_vector = false;

    if (s.by_rows) {
      s.rows = op;
      s.log_order = log_n2;
      s.mma = is_16_bit(s.from_type) && is_16_bit(s.to_type) && !s.has_pre && log_n2 >= kMinMmaBits;
      const auto shape = [&](auto plan) {
        using P = decltype(plan);
        const int64_t tiles = detail::ceil_div(rows, int64_t{P::kGroups} << P::kRowBits);
        s.threads = P::kThreads;
        s.shared_bytes = P::kExchangeBytes;
        s.grid = static_cast<unsigned>(std::min<int64_t>(tiles, kMaxGrid));
        s.prefetch = P::kCanPrefetch && op.x_vector &&
                     s.shared_bytes + P::kPrefetchBytes <= device_.shared_per_block &&
                     tiles > device_.multiprocessors * P::kMinBlocks;
        if (s.prefetch) {
          s.shared_bytes += P::kPrefetchBytes;
          const int64_t resident = std::max<int64_t>(1, device_.shared_per_block / (s.shared_bytes + 1024));
          s.grid =
              static_cast<unsigned>(device_.multiprocessors * std::min<int64_t>(resident, P::kMinBlocks));
        }
      };
      if (!is_16_bit(s.to_type) || widened) detail::with_rows_plan<2, false>(log_n2, shape);
      else if (s.mma) detail::with_rows_plan<3, true>(log_n2, shape);
      else detail::with_rows_plan<3, false>(log_n2, shape);
    } else {
      TileOperands<float>& p = s.tile;
      p.op = op;
      p.transpose = t_.transpose;
      p.K = static_cast<int>(K), p.log_n2 = log_n2;
      p.columns = columns.size, p.x_column = columns.x, p.y_column = columns.y, p.sign_column = columns.signs;
      const size_t held = accumulator_bytes(), table = table_bytes(K);
      const auto fits = [&](int extra_bits) {
        return (static_cast<size_t>(ax.size) * held << extra_bits) + 128 + table <= device_.shared_per_block;
      };
      if (!fits(0))
        throw std::invalid_argument("torchlin: this order does not fit the device's shared memory");
      // 32 columns are a full line for 32-bit types and leave a block enough to do; short rows are put
      // together.
      int bits = 0;
      if (columns.size > 1) {
        const int wanted = std::min(5, detail::log2_floor(columns.size - 1) + 1);
        while (bits < wanted && fits(bits + 1)) ++bits;
        p.log_columns = bits;
      } else {
        const int wanted = rows > 1 ? detail::log2_floor(rows - 1) + 1 : 0;
        while (bits < wanted && fits(bits + 1) && ((ax.size << bits) < kTileElements || (run << bits) < 64))
          ++bits;
        p.log_rows = bits;
      }
      s.mma = K > 1 && t_.type != Type::f64 && s.from_type == s.to_type && op.x_vector && run >= 8 &&
              columns.size == 1 && (run << p.log_rows) >= 64;
      s.threads = kTileThreads;
      s.shared_bytes = (static_cast<size_t>(ax.size) * held << bits) + 128 + table;
      const int64_t tiles = detail::ceil_div(rows, int64_t{1} << p.log_rows) *
                            detail::ceil_div(columns.size, int64_t{1} << p.log_columns);
      // The bits of H_K are packed once a block: with K > 1 blocks stay and take several tiles.
      const int64_t resident = std::clamp<int64_t>(device_.shared_per_block / (s.shared_bytes + 1024), 1, 8);
      s.grid = static_cast<unsigned>(
          std::min<int64_t>(tiles, K > 1 ? device_.multiprocessors * resident : kMaxGrid));
    }

    std::vector<int64_t> index(outer.size(), 0);
    while (true) {
      s.from_offset = s.to_offset = s.sign_offset = 0;
      for (size_t d = 0; d < outer.size(); ++d) {
        s.from_offset += index[d] * outer[d].x, s.to_offset += index[d] * outer[d].y;
        s.sign_offset += index[d] * outer[d].signs;
      }
      plan_.steps.push_back(s);
      size_t d = 0;
      while (d < outer.size() && ++index[d] == outer[d].size) index[d++] = 0;
      if (d == outer.size()) break;
    }
  }

  static constexpr int64_t kMaxGrid = 0x7fffffff;
  static constexpr int64_t kTileElements = 4096;

  const Transform& t_;
  const Device& device_;
  Plan plan_;
};

inline Plan make_plan(const Transform& t, const Device& device) { return Planner(t, device).take(); }

struct Pointers {
  const void* x;
  void* y;
  void* workspace;
  const void* signs;
  const int8_t* had;
  double scale;
};

namespace detail {

template <class A>
Operands<A> bind(const Operands<float>& from, const Step& s, const Pointers& at) {
  const auto buffer = [&](Buffer b) -> char* {
    return static_cast<char*>(b == Buffer::x   ? const_cast<void*>(at.x)
                              : b == Buffer::y ? at.y
                                               : at.workspace);
  };
  Operands<A> op{};
  op.x = buffer(s.from) + s.from_offset * static_cast<int64_t>(size_of(s.from_type));
  op.y = buffer(s.to) + s.to_offset * static_cast<int64_t>(size_of(s.to_type));
  const A* signs = static_cast<const A*>(at.signs) + s.sign_offset;
  op.pre = s.has_pre ? signs : nullptr;
  op.post = s.has_post ? signs : nullptr;
  op.scale = s.last ? static_cast<A>(at.scale) : A{1};
  op.rows = from.rows, op.map = from.map;
  op.x_stride = from.x_stride, op.y_stride = from.y_stride, op.sign_stride = from.sign_stride;
  op.x_vector = from.x_vector, op.y_vector = from.y_vector, op.sign_vector = from.sign_vector;
  return op;
}

template <class Tin, class Tout, class Launcher>
void run_rows(const Step& s, const Pointers& at, Launcher&& launch) {
  const auto op = bind<float>(s.rows, s, at);
  constexpr bool kNarrow = sizeof(Tin) == 2;
  const auto go = [&](auto plan) {
    launch(fwht_rows<decltype(plan), Tin, Tout>, s.grid, s.threads, s.shared_bytes, op, s.prefetch);
  };
  if constexpr (!std::is_same_v<Tin, Tout>) {
    go(RowsPlan<12, 2, false>{});
  } else if constexpr (kNarrow) {
    if (s.mma) with_rows_plan<3, true>(s.log_order, go);
    else with_rows_plan<3, false>(s.log_order, go);
  } else {
    with_rows_plan<2, false>(s.log_order, go);
  }
}

template <class Tin, class Tout, class Launcher>
void run_tile(const Step& s, const Pointers& at, Launcher&& launch) {
  using A = accumulate_t<Tout>;
  TileOperands<A> p{};
  p.op = bind<A>(s.tile.op, s, at);
  p.had = at.had;
  p.transpose = s.tile.transpose;
  p.K = s.tile.K, p.log_n2 = s.tile.log_n2, p.log_rows = s.tile.log_rows, p.log_columns = s.tile.log_columns;
  p.columns = s.tile.columns;
  p.x_column = s.tile.x_column, p.y_column = s.tile.y_column, p.sign_column = s.tile.sign_column;
  if constexpr (std::is_same_v<Tin, Tout> && !std::is_same_v<Tin, double>) {
    if (s.mma) return launch(fwht_tile<Tin, Tout, true>, s.grid, s.threads, s.shared_bytes, p);
  }
  launch(fwht_tile<Tin, Tout, false>, s.grid, s.threads, s.shared_bytes, p);
}

template <class T, class Launcher>
void run_step(const Step& s, const Pointers& at, Launcher&& launch) {
  const bool narrow_in = s.from_type != Type::f32, narrow_out = s.to_type != Type::f32;
  if constexpr (std::is_same_v<T, double>) {
    run_tile<T, T>(s, at, launch);
  } else if constexpr (std::is_same_v<T, float>) {
    if (s.by_rows) run_rows<T, T>(s, at, launch);
    else run_tile<T, T>(s, at, launch);
  } else if (narrow_in && narrow_out) {
    if (s.by_rows) run_rows<T, T>(s, at, launch);
    else run_tile<T, T>(s, at, launch);
  } else if (narrow_in) {
    run_tile<T, float>(s, at, launch);
  } else if (narrow_out) {
    if (s.by_rows) run_rows<float, T>(s, at, launch);
    else run_tile<float, T>(s, at, launch);
  } else {
    run_tile<float, float>(s, at, launch);
  }
}

}  // namespace detail

// Runs a plan for element type T: launch(kernel, grid, threads, shared bytes, kernel arguments...) once a
// step.
template <class T, class Launcher>
void run_plan(const Plan& plan, const Pointers& at, Launcher&& launch) {
  for (const Step& s : plan.steps) detail::run_step<T>(s, at, launch);
}

}  // namespace torchlin::hadamard
