// Which kernels a call launches, with what arguments: free of torch, so that the tests plan as op.cu does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "activation/kernel.cuh"

namespace torchlin::activation {

static __global__ void __launch_bounds__(kThreads) fold_sums(const __grid_constant__ FoldArguments f) { fold(f); }

enum Split : int64_t { kNone, kHalves, kHalvesSwapped, kInterleaved, kInterleavedSwapped };

struct View {
  char* data = nullptr;  // null: not there, or not wanted
  const int64_t* strides = nullptr;
};

// The raw ops' arguments. A packed tensor takes the place of the first two inputs (outputs of the backward).
struct Call {
  Type type;
  int inputs, slots;
  std::vector<int64_t> sizes;  // of the output
  bool gradient;               // backward: `out` are the gradients by `in`
  View in[3], grad, out[3];
  int64_t split = kNone, split_dim = 0;
  const float* slot_values = nullptr;
  int64_t channels = 1, channel_dim = 0;
  std::vector<int64_t> lengths;
  float* slot_grads = nullptr;
};

struct Launch {
  SumArguments arguments;  // .of alone, but for sums
  bool with_sums;
  int64_t sums_offset;  // where .sums begin
  unsigned grid_x, grid_y;
  size_t shared_bytes;
};

struct Plan {
  std::vector<Launch> launches;
  int64_t sums = 0;  // doubles, to be zeroed if there is more than one launch
  FoldArguments fold{};
  unsigned fold_grid = 0;  // 0: nothing to fold
};

inline Divider divider(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t factor = ((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor;
  return {divisor, static_cast<uint32_t>(factor), shift};
}

class Planner {
 public:
  // A launch has at most `limit` elements, a multiple of a tile; a block at most `shared_bytes` of shared memory.
  Planner(const Call& call, size_t shared_bytes, int64_t limit = int64_t{1} << 30) : call_(call), limit_(limit) {
    if (call.slots > kMaxSlots) throw std::invalid_argument("activation: more than 32 slots");
    for (const int64_t size : call.sizes) {
      if (size == 0) return;
    }
    for (int i = 0; i < call.slots; ++i) rows_ += call.lengths[i];
    window_ = std::min<int64_t>(rows_, static_cast<int64_t>(shared_bytes / (kThreads * sizeof(float))));
    collect();
    for (const Dim& d : dims_) {
      if (d.channel) break;
      inner_ *= d.size;
    }
    std::vector<Dim> dims = dims_;
    cut(dims, Base{});
    if (with_sums()) finish_sums();
  }

  Plan take() { return std::move(plan_); }

 private:
  enum { kIn = 0, kGrad = 3, kOut = 4, kOperands = 7 };
  struct Dim {
    int64_t size, stride[kOperands];
    bool channel;
  };
  struct Base {
    int64_t offset[kOperands] = {}, channel = 0;
  };

  bool with_sums() const { return call_.slot_grads != nullptr; }
  int element_size() const { return call_.type == kFloat32 ? 4 : 2; }

  // Views of single inputs, and the dimensions in the order of what is written, the innermost first.
  void collect() {
    std::vector<int64_t> stride[kOperands];
    const auto set = [&](int operand, const View& v) {
      if (v.data == nullptr) return;
      data_[operand] = v.data;
      stride[operand].assign(v.strides, v.strides + call_.sizes.size());
    };
    const auto set_all = [&](int first, const View (&views)[3], bool packed) {
      int operand = first;
      for (int i = 0; operand < first + call_.inputs; ++i) {
        set(operand, views[i]);
        if (packed && i == 0) {
          if (views[0].data != nullptr) {
            const bool interleaved = call_.split >= kInterleaved;
            int64_t& step = stride[operand][call_.split_dim];
            const int64_t apart = step * (interleaved ? 1 : call_.sizes[call_.split_dim]) * element_size();
            if (interleaved) step *= 2;
            const bool swapped = call_.split == kHalvesSwapped || call_.split == kInterleavedSwapped;
            data_[operand + 1] = views[0].data + (swapped ? 0 : apart);
            data_[operand] = views[0].data + (swapped ? apart : 0);
            stride[operand + 1] = stride[operand];
          }
          ++operand;
        }
        ++operand;
      }
    };
    const bool packed = call_.split != kNone;
    set_all(kIn, call_.in, packed);
    if (call_.gradient) {
      set(kGrad, call_.grad);
      set_all(kOut, call_.out, packed);
    } else {
      set(kOut, call_.out[0]);
    }
    int lead = kIn;
    for (int i = kOperands; i-- > kOut;) {
      if (data_[i] != nullptr) lead = i;
    }
    for (size_t d = 0; d < call_.sizes.size(); ++d) {
      if (call_.sizes[d] == 1) continue;
      Dim dim{call_.sizes[d], {}, call_.channels > 1 && static_cast<int64_t>(d) == call_.channel_dim};
      for (int i = 0; i < kOperands; ++i) dim.stride[i] = data_[i] != nullptr ? stride[i][d] : 0;
      dims_.push_back(dim);
    }
    std::reverse(dims_.begin(), dims_.end());
    std::stable_sort(dims_.begin(), dims_.end(), [&](const Dim& a, const Dim& b) { return a.stride[lead] < b.stride[lead]; });
  }

  static int64_t count(const std::vector<Dim>& dims) {
    int64_t n = 1;
    for (const Dim& d : dims) n *= d.size;
    return n;
  }
  static void advance(Base& base, const Dim& dim, int64_t steps) {
    for (int i = 0; i < kOperands; ++i) base.offset[i] += steps * dim.stride[i];
    if (dim.channel) base.channel += steps;
  }

  // Pieces along the outermost dimension, until they fit into a launch.
  void cut(std::vector<Dim>& dims, Base base) {
    const int64_t total = count(dims);
    if (total <= limit_) return add(dims, base);
    Dim& outer = dims.back();
    const int64_t size = outer.size, below = total / size;
    if (below > limit_) {
      const Dim taken = outer;
      dims.pop_back();
      for (int64_t i = 0; i < size; ++i, advance(base, taken, 1)) cut(dims, base);
      dims.push_back(taken);
      return;
    }
    const int64_t step = limit_ / below;
    for (int64_t i = 0; i < size; i += step, advance(base, outer, step)) {
      outer.size = std::min(step, size - i);
      add(dims, base);
    }
    outer.size = size;
  }

  std::vector<Dim> merge(const std::vector<Dim>& dims) const {
    std::vector<Dim> merged;
    for (const Dim& d : dims) {
      const auto continues = [&](const Dim& below) {
        for (int i = 0; i < kOperands; ++i) {
          if (d.stride[i] != below.stride[i] * below.size) return false;
        }
        return true;
      };
      if (!merged.empty() && continues(merged.back())) merged.back().size *= d.size;
      else merged.push_back(d);
    }
    if (merged.empty()) merged.push_back({1, {1, 1, 1, 1, 1, 1, 1}, false});
    return merged;
  }

  // Whether eight elements side by side move in 16-byte accesses; sets `interleaved`.
  bool vectors(const std::vector<Dim>& merged, char* const* data, bool& interleaved) const {
    const Dim& row = merged[0];
    if (merged.size() > 1 && row.size % kPerThread != 0) return false;
    const auto pair = [&](int first) {
      return data[first] != nullptr && row.stride[first] == 2 && row.stride[first + 1] == 2 &&
             std::abs(data[first + 1] - data[first]) == element_size();
    };
    interleaved = call_.inputs > 1 && pair(kIn) && (data[kOut] == nullptr || !call_.gradient || pair(kOut));
    for (int i = 0; i < kOperands; ++i) {
      if (data[i] == nullptr) continue;
      const bool paired = interleaved && (i < 2 || (call_.gradient && (i == kOut || i == kOut + 1)));
      if (row.stride[i] != (paired ? 2 : 1)) return false;
      const char* begin = paired ? std::min(data[i & ~1], data[i | 1]) : data[i];
      if (reinterpret_cast<uintptr_t>(begin) % 16 != 0) return false;
      for (size_t d = 1; d < merged.size(); ++d) {
        if (merged[d].stride[i] * element_size() % 16 != 0) return false;
      }
    }
    return true;
  }

  void add(const std::vector<Dim>& dims, const Base& base) {
    const std::vector<Dim> merged = merge(dims);
    if (merged.size() > kMaxDims) throw std::invalid_argument("activation: more than 12 separate dimensions");
    Launch launch{};
    Arguments& a = launch.arguments.of;
    char* data[kOperands];
    for (int i = 0; i < kOperands; ++i) {
      data[i] = data_[i] == nullptr ? nullptr : data_[i] + base.offset[i] * element_size();
      Operand& x = i < kGrad ? a.in[i] : i == kGrad ? a.grad : a.out[i - kOut];
      x.data = data[i];
      for (size_t d = 0; d < merged.size(); ++d) x.stride[d] = merged[d].stride[i];
    }
    for (size_t d = 0; d < merged.size(); ++d) a.dims[d] = divider(static_cast<uint32_t>(merged[d].size));
    a.ndim = static_cast<int>(merged.size());
    a.total = static_cast<uint32_t>(count(dims));
    a.type = call_.type;
    a.vectors = vectors(merged, data, a.interleaved);
    a.slots = call_.slot_values + base.channel;
    int64_t inner = 1;
    bool seen = false;
    for (const Dim& d : dims) {
      seen |= d.channel;
      if (!seen) inner *= d.size;
    }
    if (!seen) inner = a.total;  // the piece lies in one channel
    a.inner = divider(static_cast<uint32_t>(inner));
    a.channels = divider(static_cast<uint32_t>(call_.channels));
    for (int i = 0, row = 0; i < call_.slots; ++i) {
      a.first_row[i] = row;
      a.length[i] = static_cast<int>(call_.lengths[i]);
      row += a.length[i];
    }
    launch.grid_x = (a.total + kTile - 1) / kTile;
    launch.grid_y = 1;
    launch.with_sums = with_sums();
    if (with_sums()) add_sums(launch, inner, base);
    else plan_.launches.push_back(launch);
  }

  void add_sums(Launch launch, int64_t inner, const Base& base) {
    SumArguments& s = launch.arguments;
    const int64_t total = s.of.total, channels = std::max<int64_t>(1, std::min(call_.channels, total / inner));
    s.by_columns = by_columns();
    if (s.by_columns) {
      s.columns = static_cast<uint32_t>(channels * inner);
      s.end = static_cast<uint32_t>(total / s.columns);
      launch.grid_x = (s.columns + kColumns - 1) / kColumns;
      s.of.vectors = false;
      s.width = call_.channels * inner_;
    } else {
      s.end = static_cast<uint32_t>(total / channels);
      s.skip = static_cast<uint32_t>((channels - 1) * inner);
      launch.grid_x = static_cast<unsigned>(channels);
      if (channels > 1 && inner % kPerThread != 0) s.of.vectors = false;
      s.width = call_.channels;
    }
    constexpr int64_t kBlocks = 1024, kTilesOfPart = 4;
    const int64_t tile = s.by_columns ? kRowsAtOnce * kPerThread : kTile;
    const int64_t wanted = std::min(s.end / (tile * kTilesOfPart), kBlocks / launch.grid_x), most = std::max<int64_t>(1, wanted);
    s.part = static_cast<uint32_t>((s.end + most * tile - 1) / (most * tile) * tile);
    launch.grid_y = (s.end + s.part - 1) / s.part;
    launch.shared_bytes = static_cast<size_t>(window_) * kThreads * sizeof(float);
    s.rows = static_cast<int>(rows_);
    launch.sums_offset = parts_ * rows_ * s.width + base.channel * (s.by_columns ? inner_ : 1);
    parts_ += launch.grid_y;
    // As many rows at once as shared memory holds; the first run of them writes what depends on no row.
    for (int64_t row = 0; row < rows_; row += window_) {
      s.first_row = static_cast<int>(row);
      s.window = static_cast<int>(std::min(window_, rows_ - row));
      plan_.launches.push_back(launch);
      for (Operand& out : s.of.out) out.data = nullptr;
    }
  }

  bool by_columns() const { return call_.channels > 1 && inner_ < 256; }

  void finish_sums() {
    const int64_t inner = by_columns() ? inner_ : 1;
    plan_.fold = {nullptr, call_.slot_grads, rows_ * call_.channels, static_cast<uint32_t>(inner), static_cast<uint32_t>(parts_)};
    plan_.sums = parts_ * plan_.fold.count * inner;
    plan_.fold_grid = static_cast<unsigned>((plan_.fold.count + kThreads / 32 - 1) / (kThreads / 32));
  }

  const Call& call_;
  int64_t limit_, rows_ = 0, window_ = 0, parts_ = 0, inner_ = 1;
  char* data_[kOperands] = {};
  std::vector<Dim> dims_;
  Plan plan_;
};

inline Plan make_plan(const Call& call, size_t shared_bytes, int64_t limit = int64_t{1} << 30) {
  return Planner(call, shared_bytes, limit).take();
}

// Runs a plan: launch(kernel, grid_x, grid_y, shared_bytes, arguments), for a device or the emulator.
template <class LaunchKernel>
void run_plan(const Plan& plan, const Functor& functor, bool gradient, double* sums, LaunchKernel&& launch) {
  for (const Launch& l : plan.launches) {
    if (l.with_sums) {
      SumArguments s = l.arguments;
      s.sums = sums + l.sums_offset;
      launch(functor.backward_slots, l.grid_x, l.grid_y, l.shared_bytes, s);
    } else {
      launch(gradient ? functor.backward : functor.forward, l.grid_x, l.grid_y, size_t{0}, l.arguments.of);
    }
  }
  if (plan.fold_grid > 0) {
    FoldArguments f = plan.fold;
    f.sums = sums;
    launch(fold_sums, plan.fold_grid, 1u, size_t{0}, f);
  }
}

}  // namespace torchlin::activation
