#include "activation/loop.h"

#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace torchlin::activation {
namespace {

constexpr int64_t kBlock = 1024;      // elements of a block in scratch
constexpr int64_t kSumBlock = 2048;   // elements whose slot gradients are summed in the compute type
constexpr int64_t kFoldRows = 32;     // as many values are added up in the compute type where channels are innermost
constexpr int64_t kShortRun = 64;     // shorter inner runs are gathered, several to a block
constexpr int64_t kScratch = 48 << 10;  // bytes

struct Cursor {
  int64_t index[64];
  int64_t at[kOperands];
};

template <class C>
class Worker {
 public:
  Worker(const Loop& loop, double* sums)
      : loop_(loop), sums_(sums), sizeof_(loop.element_size()), compute_(loop.copies[sizeof(C) == 8 ? kDouble : kFloat]) {
    const int64_t per_element = loop.count + loop.rows * ((loop.channels > 1) + (sums != nullptr));
    block_ = std::clamp<int64_t>(kScratch / static_cast<int64_t>(sizeof(C)) / per_element, 64, kBlock) & -64;
    args_.first_row = loop.first_row;
    args_.lengths = loop.lengths;
    contiguous_ = loop.storage <= kDouble || loop.direct_kernel != nullptr;
    for (int i = 0; i < loop.count; ++i) contiguous_ &= loop.dims[0].step[loop.operands[i]] == 1;
    channel_runs_ = loop.channels > 1 && loop.dims[0].step[kChannel] == 1;
  }

  void run(int64_t begin, int64_t end) {
    seek(begin);
    const int64_t run = loop_.dims[0].size;
    const int64_t limit = sums_ != nullptr ? (contiguous_ ? kSumBlock : block_) : contiguous_ ? INT64_MAX : block_;
    const bool runs_ok = loop_.channels == 1 || loop_.dims[0].step[kChannel] <= 1;
    while (begin < end) {
      const int64_t left = std::min(run - cursor_.index[0], end - begin);
      int64_t n;
      if (run < kShortRun && loop_.ndim > 1) {
        n = std::min(block_, end - begin);
        execute(n, true);
      } else {
        n = std::min(left, limit);
        if (n >= loop_.lanes && runs_ok) {
          n -= n % loop_.lanes;
          execute(n, false);
        } else {
          n = std::min(n, block_);
          execute(n, true);
        }
      }
      begin += n;
    }
    fold_channels();
  }

 private:
  // Of the storage type a kernel takes all operands or none.
  bool is_direct(int operand) const {
    return contiguous_ || (loop_.storage <= kDouble && loop_.dims[0].step[operand] == 1);
  }

  void seek(int64_t position) {
    std::fill(cursor_.at, cursor_.at + kOperands, 0);
    for (int d = 0; d < loop_.ndim; ++d) {
      cursor_.index[d] = position % loop_.dims[d].size;
      position /= loop_.dims[d].size;
      for (int o = 0; o < kOperands; ++o) cursor_.at[o] += cursor_.index[d] * loop_.dims[d].step[o];
    }
  }

  // n elements on, n at most to the end of the inner run.
  void advance(Cursor& c, int64_t n) const {
    c.index[0] += n;
    for (int o = 0; o < kOperands; ++o) c.at[o] += n * loop_.dims[0].step[o];
    for (int d = 0; c.index[d] == loop_.dims[d].size && d + 1 < loop_.ndim; ++d) {
      c.index[d] = 0;
      ++c.index[d + 1];
      for (int o = 0; o < kOperands; ++o) c.at[o] += loop_.dims[d + 1].step[o] - loop_.dims[d].size * loop_.dims[d].step[o];
    }
  }

  // f(cursor, position, length) for the parts of inner runs that the next n elements are in.
  template <class F>
  void segments(int64_t n, const F& f) const {
    Cursor c;
    std::copy_n(cursor_.index, loop_.ndim, c.index);
    std::copy_n(cursor_.at, kOperands, c.at);
    for (int64_t position = 0; position < n;) {
      const int64_t length = std::min(loop_.dims[0].size - c.index[0], n - position);
      f(c, position, length);
      advance(c, length);
      position += length;
    }
  }

  static void pad(C* block, int64_t n, int64_t padded) { std::fill(block + n, block + padded, block[n - 1]); }

  // The next n elements: whole vectors of one run or, gathered, any.
  void execute(int64_t n, bool gathered) {
    const int64_t padded = (n + loop_.lanes - 1) / loop_.lanes * loop_.lanes;
    const Copies& copies = loop_.copies[loop_.storage];
    bool in_scratch[kOperands] = {};
    C* scratch = nullptr;
    const auto take = [&](int64_t size) {
      if (scratch == nullptr) scratch = this->scratch();
      C* const block = scratch;
      scratch += size;
      return block;
    };
    C* blocks[kOperands];
    for (int i = 0; i < loop_.count; ++i) {
      const int o = loop_.operands[i];
      void* data;
      if (!gathered && is_direct(o)) {
        data = loop_.base[o] + cursor_.at[o] * sizeof_;
      } else {
        in_scratch[o] = true;
        C* const block = blocks[o] = take(padded);
        data = block;
        if (o < kOutput) {
          segments(n, [&](const Cursor& c, int64_t position, int64_t length) {
            copies.gather(loop_.base[o] + c.at[o] * sizeof_, loop_.dims[0].step[o], length, block + position);
          });
          pad(block, n, padded);
        }
      }
      if (o < kGrad) args_.inputs[o] = data;
      else if (o == kGrad) args_.grad = data;
      else args_.outputs[o - kOutput] = data;
    }

    const int64_t channel = cursor_.at[kChannel];
    const bool per_element = loop_.channels > 1 && (gathered || channel_runs_);
    if (loop_.rows > 0) set_slots(n, padded, gathered, take);
    C* sums = nullptr;
    if (sums_ != nullptr) {
      if (!gathered && per_element) {
        sums = channel_sums() + channel;
        args_.slot_grads_ld = loop_.channels;
      } else {
        args_.slot_grads_ld = gathered ? padded : loop_.lanes;
        sums = take(loop_.rows * args_.slot_grads_ld);
        std::fill_n(sums, loop_.rows * args_.slot_grads_ld, C(0));
      }
      args_.slot_grads_step = gathered || per_element;
      args_.slot_grads = sums;
    }

    args_.n = padded;
    args_.stream = loop_.stream && !gathered && contiguous_ && reinterpret_cast<uintptr_t>(args_.outputs[0]) % 64 == 0;
    if (!gathered && contiguous_ && loop_.storage > kDouble) loop_.direct_kernel(args_);
    else loop_.kernel(args_);

    for (int i = 0; i < loop_.count; ++i) {
      const int o = loop_.operands[i];
      if (o < kOutput || !in_scratch[o]) continue;
      segments(n, [&](const Cursor& c, int64_t position, int64_t length) {
        copies.scatter(blocks[o] + position, loop_.dims[0].step[o], length, loop_.base[o] + c.at[o] * sizeof_);
      });
    }
    if (sums_ != nullptr) add_sums(n, gathered, per_element, sums);
    if (!gathered) {
      advance(cursor_, n);
    } else {
      segments(n, [&](const Cursor&, int64_t, int64_t length) { advance(cursor_, length); });
    }
  }

  template <class Take>
  void set_slots(int64_t n, int64_t padded, bool gathered, const Take& take) {
    const C* slots = reinterpret_cast<const C*>(loop_.slots);
    const int64_t rows = loop_.rows, channels = loop_.channels, channel = cursor_.at[kChannel];
    if (channels == 1 || (!gathered && !channel_runs_)) {
      if (channel != spread_channel_) {
        if (spread_.empty()) spread_.resize(rows * loop_.lanes);
        for (int64_t r = 0; r < rows; ++r) std::fill_n(&spread_[r * loop_.lanes], loop_.lanes, slots[r * channels + channel]);
        spread_channel_ = channel;
      }
      args_.slots = spread_.data();
      args_.slots_ld = loop_.lanes;
      args_.slots_step = 0;
    } else if (!gathered) {
      args_.slots = slots + channel;
      args_.slots_ld = channels;
      args_.slots_step = 1;
    } else {
      C* block = take(rows * padded);
      for (int64_t r = 0; r < rows; ++r) {
        segments(n, [&](const Cursor& c, int64_t position, int64_t length) {
          compute_.gather(slots + r * channels + c.at[kChannel], loop_.dims[0].step[kChannel], length,
                          block + r * padded + position);
        });
        pad(block + r * padded, n, padded);
      }
      args_.slots = block;
      args_.slots_ld = padded;
      args_.slots_step = 1;
    }
  }

  void add_sums(int64_t n, bool gathered, bool per_element, const C* sums) {
    const int64_t rows = loop_.rows, channels = loop_.channels, ld = args_.slot_grads_ld;
    if (gathered) {
      segments(n, [&](const Cursor& c, int64_t position, int64_t length) {
        const int64_t step = channels > 1 ? loop_.dims[0].step[kChannel] : 0;
        for (int64_t r = 0; r < rows; ++r) {
          double* const to = sums_ + r * channels + c.at[kChannel];
          for (int64_t i = 0; i < length; ++i) to[i * step] += sums[r * ld + position + i];
        }
      });
    } else if (per_element) {
      pending_ += n;
      if (pending_ >= kFoldRows * channels) fold_channels();
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        double total = 0;
        for (int64_t i = 0; i < loop_.lanes; ++i) total += sums[r * ld + i];
        sums_[r * channels + cursor_.at[kChannel]] += total;
      }
    }
  }

  C* channel_sums() {
    if (channel_sums_.empty()) channel_sums_.assign(loop_.rows * loop_.channels, C(0));
    return channel_sums_.data();
  }
  void fold_channels() {
    if (pending_ == 0) return;
    for (size_t i = 0; i < channel_sums_.size(); ++i) {
      sums_[i] += channel_sums_[i];
      channel_sums_[i] = 0;
    }
    pending_ = 0;
  }

  C* scratch() {
    if (scratch_ == nullptr) {
      const int64_t per_element = loop_.count + 2 * loop_.rows;
      heap_.reset(new C[per_element * std::max<int64_t>(block_, 64) + 128]);
      scratch_ = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(heap_.get()) + 63) & -64);
    }
    return scratch_;
  }

  const Loop& loop_;
  double* const sums_;
  const int64_t sizeof_;
  const Copies& compute_;
  int64_t block_;
  bool contiguous_, channel_runs_;
  Args args_;
  Cursor cursor_;
  std::vector<C> spread_;  // slots of one channel, as vectors of equal lanes
  int64_t spread_channel_ = -1;
  std::vector<C> channel_sums_;
  int64_t pending_ = 0;  // elements whose slot gradients are in channel_sums_
  C* scratch_ = nullptr;
  std::unique_ptr<C[]> heap_;
};

}  // namespace

void Loop::merge(int lead) {
  if (ndim == 0) dims[ndim++] = Dim{1, {1, 1, 1, 1, 1, 1, 1, 0}};
  std::reverse(dims, dims + ndim);
  std::stable_sort(dims, dims + ndim, [&](const Dim& a, const Dim& b) { return a.step[lead] < b.step[lead]; });
  int kept = 0;
  for (int i = 1; i < ndim; ++i) {
    Dim& inner = dims[kept];
    bool touch = channels == 1 || dims[i].step[kChannel] == inner.size * inner.step[kChannel];
    for (int k = 0; k < count; ++k) touch &= dims[i].step[operands[k]] == inner.size * inner.step[operands[k]];
    if (touch) inner.size *= dims[i].size;
    else dims[++kept] = dims[i];
  }
  ndim = kept + 1;
}

void Loop::run(int64_t begin, int64_t end, double* sums) const {
  if (storage == kDouble) Worker<double>(*this, sums).run(begin, end);
  else Worker<float>(*this, sums).run(begin, end);
#if defined(__x86_64__)
  if (stream) _mm_sfence();  // before another thread reads
#endif
}

}  // namespace torchlin::activation
