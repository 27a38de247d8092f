// A SIMT emulator for tests: g++ compiles the very .cuh that nvcc compiles, and each CUDA thread runs as a
// fiber.
//
// What it reports as an error (simt::Error), always with the seed of the schedule, the block and the thread:
//   - barriers that not all threads of the block reach, or reach at different lines; threads that exit while
//   others wait
//   - warp operations (shuffles, votes, __syncwarp, mma) whose mask names a lane that does not come, or
//   leaves out its caller
//   - shared memory read or written out of bounds, misaligned, read before anyone wrote it, or accessed by
//   two threads with
//     no barrier between them (one of them writing)
//   - launches that a device would refuse
// Threads, warps and blocks run in an order drawn from the seed; shared memory starts as NaN in every
// floating format. One emulated launch at a time: all state is global.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

namespace simt {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Limits {
  size_t shared_bytes = 227 * 1024;  // a block on compute capability 9.0, with the opt-in
  unsigned block_threads = 1024;
};

struct Stats {
  uint64_t launches = 0, blocks = 0, threads = 0, block_barriers = 0, warp_ops = 0, shared_reads = 0,
           shared_writes = 0;
};

enum class WarpOp : uint8_t { sync, shuffle, vote, matrix };

namespace detail {

enum class Wait : uint8_t { none, block, warp };

struct Thread {
  Fiber fiber;
  dim3 index;
  Wait wait = Wait::none;
  bool done = false;
  WarpOp op = WarpOp::sync;
  uint32_t mask = 0;
  int site = 0;       // source line: two barriers are the same barrier only if they are the same line
  int predicate = 0;  // posted to __syncthreads_or and friends; holds the result after the barrier
  alignas(16) unsigned char payload[64];
  alignas(16) unsigned char posted[64];            // payload as it was when the warp operation completed
  std::vector<std::function<void()>> open_copies;  // asynchronous copies not yet committed to a group,
  std::vector<std::vector<std::function<void()>>> copy_groups;  // and the groups in flight, oldest first
};

// Who touched a 4-byte word of shared memory last. Two accesses are ordered by program order, by a block
// barrier between them (block_epoch), or, within a warp, by a __syncwarp between them (warp_epoch).
struct Word {
  enum Readers : uint8_t { nobody, one, one_warp, many };
  uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
  uint16_t writer = 0, reader = 0;
  Readers readers = nobody;
  bool written = false, initialised = false;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::function<void()> body;
  dim3 grid, block, block_index;
  unsigned count = 0, current = 0;
  uint64_t seed = 0;
  std::mt19937_64 random;
  uint32_t block_epoch = 1;
  std::vector<uint32_t> warp_epoch;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Word> words;
  std::exception_ptr failure;
  Limits limits;
  Stats stats;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline Thread& self() { return *machine().threads[machine().current]; }

[[noreturn]] inline void fail(const std::string& what, bool with_thread = true) {
  const Machine& m = machine();
  std::ostringstream s;
  s << "simt: " << what << " [seed " << m.seed << ", block (" << m.block_index.x << ", " << m.block_index.y
    << ", " << m.block_index.z << ")";
  if (with_thread) s << ", thread " << m.current;
  s << "]";
  throw Error(s.str());
}

inline void fiber_main() {
  Fiber::entered();
  Machine& m = machine();
  try {
    m.body();
  } catch (...) {
    m.failure = std::current_exception();
  }
  Thread& t = self();
  t.done = true;
  t.fiber.suspend(true);
}

inline void wait(Wait kind) {
  Thread& t = self();
  t.wait = kind;
  t.fiber.suspend(false);
}

inline unsigned warp_end(unsigned begin) { return std::min(begin + 32, machine().count); }

// Completes every warp operation whose lanes have all come. Returns whether any did.
inline bool release_warps() {
  Machine& m = machine();
  bool moved = false;
  for (unsigned begin = 0; begin < m.count; begin += 32) {
    const unsigned end = warp_end(begin);
    for (unsigned i = begin; i < end; ++i) {
      Thread& t = *m.threads[i];
      if (t.done || t.wait != Wait::warp) continue;
      bool complete = true;
      for (unsigned lane = 0; lane < 32 && complete; ++lane) {
        if (!(t.mask >> lane & 1)) continue;
        if (begin + lane >= end) {
          if (t.mask == 0xffffffffu)
            continue;  // the full mask means "all lanes that exist" in a partial last warp
          complete = false;
          break;
        }
        const Thread& u = *m.threads[begin + lane];
        complete = !u.done && u.wait == Wait::warp && u.op == t.op && u.mask == t.mask && u.site == t.site;
      }
      if (!complete) continue;
      const uint32_t mask = t.mask;
      const bool orders_memory = t.op == WarpOp::sync && (mask == 0xffffffffu || end - begin < 32);
      for (unsigned j = begin; j < end; ++j) {
        if (!(mask >> (j - begin) & 1)) continue;
        Thread& u = *m.threads[j];
        std::memcpy(u.posted, u.payload, sizeof u.posted);
        u.wait = Wait::none;
      }
      if (orders_memory) ++m.warp_epoch[begin / 32];
      ++m.stats.warp_ops;
      moved = true;
    }
  }
  return moved;
}

[[noreturn]] inline void report_stuck() {
  Machine& m = machine();
  for (unsigned i = 0; i < m.count; ++i) {
    const Thread& t = *m.threads[i];
    if (t.done || t.wait != Wait::warp) continue;
    m.current = i;
    std::ostringstream s;
    s << "warp operation at line " << t.site << " waits for lanes that never come (mask 0x" << std::hex
      << t.mask << std::dec << "; missing:";
    const unsigned begin = i / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      const unsigned j = begin + lane;
      if (j >= m.count) {
        if (t.mask != 0xffffffffu) s << " " << lane << " does not exist;";
        continue;
      }
      const Thread& u = *m.threads[j];
      if (u.done) s << " " << lane << " exited;";
      else if (u.wait == Wait::block)
        s << " " << lane << " is at the block barrier of line " << u.site << ";";
      else if (u.op != t.op || u.mask != t.mask || u.site != t.site)
        s << " " << lane << " is at line " << u.site << ";";
    }
    s << ")";
    fail(s.str());
  }
  unsigned first = m.count, exited = 0;
  for (unsigned i = 0; i < m.count; ++i) {
    if (m.threads[i]->done) ++exited;
    else if (first == m.count) first = i;
  }
  m.current = first;
  const int site = m.threads[first]->site;
  if (exited) {
    fail("block barrier at line " + std::to_string(site) + ": " + std::to_string(exited) + " of " +
         std::to_string(m.count) + " threads exited without reaching it");
  }
  for (unsigned i = 0; i < m.count; ++i) {
    if (m.threads[i]->site != site) {
      fail("divergent block barrier: thread " + std::to_string(first) + " is at line " +
           std::to_string(site) + ", thread " + std::to_string(i) + " at line " +
           std::to_string(m.threads[i]->site));
    }
  }
  fail("no thread can run");
}

inline void release_block() {
  Machine& m = machine();
  const int site = m.threads[0]->site;
  int any = 0, all = 1, count = 0;
  for (unsigned i = 0; i < m.count; ++i) {
    const Thread& t = *m.threads[i];
    if (t.done || t.wait != Wait::block || t.site != site) report_stuck();
    any |= t.predicate != 0;
    all &= t.predicate != 0;
    count += t.predicate != 0;
  }
  for (unsigned i = 0; i < m.count; ++i) {
    Thread& t = *m.threads[i];
    t.wait = Wait::none;
    t.predicate = any | all << 1 | count << 2;
  }
  ++m.block_epoch;
  ++m.stats.block_barriers;
}

inline void run_block(std::vector<unsigned>& order) {
  Machine& m = machine();
  ++m.stats.blocks;
  m.stats.threads += m.count;
  // 0xFF.. is a NaN in half, bfloat16, float and double alike.
  std::fill(m.shared_storage.begin(), m.shared_storage.end(), static_cast<unsigned char>(0xFF));
  m.words.assign(m.shared_bytes / 4, Word{});
  m.warp_epoch.assign((m.count + 31) / 32, 1);
  m.block_epoch = 1;
  m.failure = nullptr;
  for (unsigned i = 0; i < m.count; ++i) {
    Thread& t = *m.threads[i];
    t.done = false;
    t.wait = Wait::none;
    t.open_copies.clear();
    t.copy_groups.clear();
    t.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
    t.fiber.start(&fiber_main);
  }
  unsigned live = m.count;
  while (live) {
    std::shuffle(order.begin(), order.end(), m.random);
    for (const unsigned i : order) {
      Thread& t = *m.threads[i];
      if (t.done || t.wait != Wait::none) continue;
      m.current = i;
      t.fiber.resume();
      if (m.failure) std::rethrow_exception(m.failure);
      if (t.done) --live;
    }
    if (live && !release_warps()) release_block();
  }
}

}  // namespace detail

inline Stats& stats() { return detail::machine().stats; }
inline Limits& limits() { return detail::machine().limits; }
// The seed of every launch from now on.
inline void set_seed(uint64_t seed) { detail::machine().seed = seed; }

template <class K, class... A>
void launch(K kernel, dim3 grid, dim3 block, size_t shared_bytes, const A&... args) {
  detail::Machine& m = detail::machine();
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto refuse = [&](const std::string& what) { throw Error("simt: invalid launch: " + what); };
  if (!threads || threads > m.limits.block_threads)
    refuse("a block of " + std::to_string(threads) + " threads");
  if (!grid.x || !grid.y || !grid.z) refuse("an empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("a grid larger than 2^31-1 x 65535 x 65535");
  if (shared_bytes > m.limits.shared_bytes) refuse(std::to_string(shared_bytes) + " bytes of shared memory");
  m.grid = grid;
  m.block = block;
  m.count = static_cast<unsigned>(threads);
  m.random.seed(m.seed);
  m.shared_bytes = (shared_bytes + 15) / 16 * 16;
  m.shared_storage.resize(m.shared_bytes + 128);
  m.shared =
      m.shared_storage.data() + (128 - reinterpret_cast<uintptr_t>(m.shared_storage.data()) % 128) % 128;
  while (m.threads.size() < m.count) m.threads.push_back(std::make_unique<detail::Thread>());
  m.body = [&] { kernel(args...); };
  ++m.stats.launches;

  std::vector<unsigned> order(m.count);
  for (unsigned i = 0; i < m.count; ++i) order[i] = i;
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const uint64_t b : blocks) {
    m.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y));
    detail::run_block(order);
  }
  m.body = nullptr;
}

// A pointer into dynamic shared memory that checks every access: bounds, alignment, initialisation, races.
template <class T>
class shared_ptr {
 public:
  static_assert(std::is_trivially_copyable_v<T> || sizeof(T) <= 16);
  using value_type = std::remove_const_t<T>;

  class reference {
   public:
    explicit reference(shared_ptr p) : p_(p) {}
    operator value_type() const { return p_.load(); }  // NOLINT: mimics T&
    const reference& operator=(const value_type& v) const {
      p_.store(v);
      return *this;
    }
    const reference& operator=(const reference& r) const { return *this = static_cast<value_type>(r); }
    const reference& operator+=(const value_type& v) const {
      return *this = static_cast<value_type>(*this) + v;
    }

   private:
    shared_ptr p_;
  };

  shared_ptr() = default;
  explicit shared_ptr(ptrdiff_t byte_offset) : offset_(byte_offset) {}
  reference operator[](ptrdiff_t i) const { return reference(*this + i); }
  reference operator*() const { return reference(*this); }
  shared_ptr operator+(ptrdiff_t i) const { return shared_ptr(offset_ + i * ptrdiff_t{sizeof(T)}); }
  shared_ptr operator-(ptrdiff_t i) const { return *this + -i; }
  shared_ptr& operator+=(ptrdiff_t i) { return *this = *this + i; }
  template <class U>
  shared_ptr<U> cast() const {
    return shared_ptr<U>(offset_);
  }

  value_type load() const {
    value_type v;
    std::memcpy(static_cast<void*>(&v), touch(false), sizeof v);
    return v;
  }
  void store(const value_type& v) const { std::memcpy(touch(true), static_cast<const void*>(&v), sizeof v); }

 private:
  unsigned char* touch(bool write) const {
    using detail::Word;
    detail::Machine& m = detail::machine();
    const auto describe = [&](const char* what) {
      detail::fail(std::string(what) + ": " + (write ? "write" : "read") + " of " +
                   std::to_string(sizeof(T)) + " bytes at byte " + std::to_string(offset_) + " of " +
                   std::to_string(m.shared_bytes));
    };
    if (offset_ < 0 || offset_ + sizeof(T) > m.shared_bytes) describe("shared memory out of bounds");
    if (offset_ % alignof(T)) describe("shared memory misaligned");
    ++(write ? m.stats.shared_writes : m.stats.shared_reads);
    const uint16_t me = static_cast<uint16_t>(m.current);
    const uint32_t block = m.block_epoch, warp = m.warp_epoch[me / 32];
    for (size_t w = offset_ / 4; w < (offset_ + sizeof(T) + 3) / 4; ++w) {
      Word& s = m.words[w];
      if (!write && !s.initialised) describe("shared memory read before it was written");
      s.initialised |= write;
      if constexpr (sizeof(T) < 4) continue;  // neighbours share a word: no claim about races between them
      const auto ordered = [&](uint16_t other, uint32_t other_block, uint32_t other_warp) {
        return other == me || other_block != block || (other / 32 == me / 32 && other_warp != warp);
      };
      if (s.written && !ordered(s.writer, s.write_block, s.write_warp)) {
        describe(("shared memory race with a write by thread " + std::to_string(s.writer)).c_str());
      }
      if (write) {
        const bool several = s.readers == Word::many || s.readers == Word::one_warp;
        if (s.readers != Word::nobody && s.read_block == block) {
          const bool fine = s.readers == Word::many ? false
                            : several               ? s.reader / 32 == me / 32 && s.read_warp != warp
                                                    : ordered(s.reader, s.read_block, s.read_warp);
          if (!fine)
            describe(("shared memory race with a read by thread " + std::to_string(s.reader)).c_str());
        }
        s.written = true;
        s.writer = me, s.write_block = block, s.write_warp = warp;
        s.readers = Word::nobody;
      } else {
        if (s.readers == Word::nobody || s.read_block != block) s.readers = Word::one;
        else if (s.reader / 32 != me / 32) s.readers = Word::many;
        else if (s.reader != me && s.readers == Word::one) s.readers = Word::one_warp;
        s.reader = me, s.read_block = block, s.read_warp = warp;
      }
    }
    return m.shared + offset_;
  }

  ptrdiff_t offset_ = 0;
};

inline unsigned lane() { return detail::machine().current & 31; }

inline int block_barrier(int predicate, int site) {
  detail::Thread& t = detail::self();
  t.predicate = predicate;
  t.site = site;
  detail::wait(detail::Wait::block);
  return t.predicate;
}

// Posts `value` and returns once every lane of `mask` has posted; then posted<T>(lane) reads what another
// lane brought.
template <class T>
void warp_post(WarpOp op, uint32_t mask, const T& value, int site) {
  static_assert(sizeof(T) <= sizeof(detail::Thread::payload));
  detail::Thread& t = detail::self();
  if (!(mask >> lane() & 1))
    detail::fail("warp operation at line " + std::to_string(site) + ": its mask leaves out the caller");
  t.op = op;
  t.mask = mask;
  t.site = site;
  std::memcpy(t.payload, static_cast<const void*>(&value), sizeof value);
  detail::wait(detail::Wait::warp);
}

template <class T>
T posted(unsigned from) {
  T value;
  const unsigned i = (detail::machine().current & ~31u) + from;
  std::memcpy(static_cast<void*>(&value), detail::machine().threads[i]->posted, sizeof value);
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int from, int site) {
  warp_post(WarpOp::shuffle, mask, value, site);
  const unsigned begin = detail::machine().current & ~31u;
  if (!(mask >> from & 1) || begin + from >= detail::machine().count) {
    detail::fail("shuffle at line " + std::to_string(site) + " reads lane " + std::to_string(from) +
                 ", which takes no part");
  }
  return posted<T>(static_cast<unsigned>(from));
}

inline uint32_t ballot(uint32_t mask, int predicate, int site) {
  warp_post(WarpOp::vote, mask, predicate, site);
  uint32_t bits = 0;
  const unsigned begin = detail::machine().current & ~31u;
  for (unsigned l = 0; l < 32 && begin + l < detail::machine().count; ++l) {
    if (mask >> l & 1) bits |= uint32_t{posted<int>(l) != 0} << l;
  }
  return bits;
}

// Asynchronous copies land only when they are waited for, so that a read that comes too early shows.
inline void async_copy(std::function<void()> copy) { detail::self().open_copies.push_back(std::move(copy)); }
inline void async_commit() {
  detail::Thread& t = detail::self();
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}
inline void async_wait(size_t groups_left) {
  auto& groups = detail::self().copy_groups;
  while (groups.size() > groups_left) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

}  // namespace simt

using simt::dim3;
#define threadIdx (::simt::detail::self().index)
#define blockIdx (::simt::detail::machine().block_index)
#define blockDim (::simt::detail::machine().block)
#define gridDim (::simt::detail::machine().grid)

// The default argument is the line of the call: it tells one barrier from another.
inline void __syncthreads(int site = __builtin_LINE()) { simt::block_barrier(0, site); }
inline int __syncthreads_or(int p, int site = __builtin_LINE()) { return simt::block_barrier(p, site) & 1; }
inline int __syncthreads_and(int p, int site = __builtin_LINE()) {
  return simt::block_barrier(p, site) >> 1 & 1;
}
inline int __syncthreads_count(int p, int site = __builtin_LINE()) {
  return simt::block_barrier(p, site) >> 2;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int site = __builtin_LINE()) {
  simt::warp_post(simt::WarpOp::sync, mask, 0, site);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, int site = __builtin_LINE()) {
  return simt::shuffle(mask, v, (simt::lane() & ~(width - 1)) | (from & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, int site = __builtin_LINE()) {
  const int me = static_cast<int>(simt::lane()), from = me ^ bits;
  return simt::shuffle(mask, v, from / width > me / width ? me : from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32, int site = __builtin_LINE()) {
  const int me = static_cast<int>(simt::lane()), from = me + delta;
  return simt::shuffle(mask, v, from / width != me / width ? me : from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32, int site = __builtin_LINE()) {
  const int me = static_cast<int>(simt::lane()), from = me - delta;
  return simt::shuffle(mask, v, from < 0 || from / width != me / width ? me : from, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, int site = __builtin_LINE()) {
  return simt::ballot(mask, p, site);
}
inline int __any_sync(unsigned mask, int p, int site = __builtin_LINE()) {
  return simt::ballot(mask, p, site) != 0;
}
inline int __all_sync(unsigned mask, int p, int site = __builtin_LINE()) {
  const unsigned begin = simt::detail::machine().current & ~31u, live = simt::detail::machine().count - begin;
  const uint32_t existing = live >= 32 ? 0xffffffffu : (1u << live) - 1;
  return (simt::ballot(mask, !p, site) & existing) == 0;
}

// Threads of one launch never run at the same time, so a plain update is atomic; its order is the schedule's.
template <class T, class U>
T atomicAdd(T* address, U value) {
  const T old = *address;
  *address = old + static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicMax(T* address, U value) {
  const T old = *address;
  *address = std::max(old, static_cast<T>(value));
  return old;
}
