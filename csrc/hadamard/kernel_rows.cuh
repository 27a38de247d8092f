// Powers of two along a contiguous axis: each element is read once and written once, in 16-byte vectors.
//
// A tile is 2^kBits consecutive elements: one row, or as many short rows as give a warp its work. Every thread holds 2^kRegs of
// them. Which bits of the element's index select the register, and which the thread, is a Layout. A stage over bit b costs an
// add per element wherever b is a register bit; between layouts, values change hands once through shared memory, instead of
// once per stage through shuffles:
//
//   registers      vector bits + top bits  |  kRegs middle bits  |  vector bits + the rest       (two exchanges, 16 bytes an element)
//   tensor cores   stages 2, 3, 4 and one more by mma, four in registers, since mma hands one more lane bit to a register:
//                  7 or 8 bits with no exchange, 10 with one
//
// The mma multiplies 16-bit inputs by +-1 and adds in fp32: as exact as the adds it replaces. Later stages would have to split
// fp32 values into 16-bit parts (about three instructions an element) to save four adds an element: not worth it, so they stay
// in registers. Where signs are multiplied in first, the product is no 16-bit number and the register path runs.
#pragma once

#include "gpu/cp_async.cuh"
#include "gpu/mma.cuh"
#include "hadamard/kernel.cuh"

namespace torchlin::hadamard {

inline constexpr int kMaxRowBits = 15;

// Bit j of a register number is bit regs[j] of the element's index in its tile; bit j of a thread number is bit threads[j].
struct Layout {
  int nregs = 0, nthreads = 0;
  int regs[6] = {}, threads[10] = {};

  __host__ __device__ constexpr int element(int reg) const {
    int e = 0;
    for (int j = 0; j < nregs; ++j) e |= (reg >> j & 1) << regs[j];
    return e;
  }
  // How many consecutive element bits begin at thread bit j; 0 inside such a run.
  __host__ __device__ constexpr int run_from(int j) const {
    if (j > 0 && threads[j] == threads[j - 1] + 1) return 0;
    int n = 1;
    while (j + n < nthreads && threads[j + n] == threads[j] + n) ++n;
    return n;
  }
  __host__ __device__ constexpr bool holds(int bit) const {
    for (int j = 0; j < nregs; ++j) {
      if (regs[j] == bit) return true;
    }
    return false;
  }
  // Hands the bits that no register holds to the threads, in ascending order: neighbours read neighbouring addresses.
  __host__ __device__ constexpr void fill_threads(int bits) {
    for (int b = 0; b < bits; ++b) {
      if (!holds(b)) threads[nthreads++] = b;
    }
  }
};

// L: log2 of the order. W: log2 of the elements in 16 bytes. Mma: the first stages run on tensor cores.
template <int L, int W, bool Mma>
struct RowsPlan {
  static constexpr int kOrderBits = L, kVectorBits = W, kVector = 1 << W;
  static constexpr bool kMma = Mma;
  static_assert(!Mma || (W == 3 && L >= 4 && L <= 10));
  static constexpr int kRegs = Mma ? (L <= 7 ? 4 : 5) : L <= 9 ? 4 : L <= (W == 2 ? 13 : 12) ? 5 : 6;
  static constexpr int kValues = 1 << kRegs;
  static constexpr int kBits = L > kRegs + 5 ? L : kRegs + 5;
  static constexpr int kTile = 1 << kBits;
  static constexpr int kRowBits = kBits - L;  // log2 of the rows in a tile
  static constexpr int kTileThreads = 1 << (kBits - kRegs);
  static constexpr int kGroups = kTileThreads >= 128 ? 1 : 128 / kTileThreads;  // tiles a block works on side by side
  static constexpr int kThreads = kTileThreads * kGroups;
  // Registers a thread may use: enough for its values and addresses, few enough to keep loads of other warps in flight.
  static constexpr int kRegisterBudget = kRegs == 4 ? 64 : kRegs == 5 ? 80 : 128;
  static constexpr int kMinBlocks = 65536 / kRegisterBudget / kThreads > 0 ? 65536 / kRegisterBudget / kThreads : 1;
  static constexpr int kLayouts = Mma ? (L <= 8 ? 2 : 3) : L <= W ? 1 : 3;
  static constexpr bool kShares = Mma ? L > 8 : L > W;
  static constexpr size_t kExchangeBytes = kShares ? sizeof(float) * kTile * kGroups : 0;
  // With one or two blocks on a multiprocessor, nothing would hide the loads of the next tile: they are started early.
  static constexpr bool kCanPrefetch = W == 3 && L >= 14;
  static constexpr size_t kPrefetchBytes = size_t{2} * kTile;

  // The layouts in order. The first is loaded into, the last is stored from; with Mma, the second is what mma leaves behind.
  __host__ __device__ static constexpr Layout layout(int which) {
    constexpr int kTop = kRegs - W;
    Layout l;
    if (Mma && which < 2) {
      constexpr int kNext = kRegs + 2;  // the lane bit that mma moves into registers
      for (int j = 0; j < 3; ++j) l.regs[j] = j;
      l.nregs = kRegs;
      if (which == 0) {
        for (int j = 3; j < kRegs; ++j) l.regs[j] = j + 2;
        const int lanes[5] = {3, 4, kNext, kNext + 1, kNext + 2};
        for (int j = 0; j < 5; ++j) l.threads[j] = lanes[j];
      } else {
        l.regs[3] = kNext;
        for (int j = 4; j < kRegs; ++j) l.regs[j] = j + 2;
        const int lanes[5] = {kNext + 1, kNext + 2, 3, 4, 5};
        for (int j = 0; j < 5; ++j) l.threads[j] = lanes[j];
      }
      l.nthreads = 5;
      return l;
    }
    l.nregs = kRegs;
    if (!Mma && which == 1) {
      for (int j = 0; j < kRegs; ++j) l.regs[j] = W + j;
    } else {
      // Vectors, and the top bits; the last layout takes the bits above the middle where the order has some there.
      const bool above_middle = !Mma && which == 2 && L > W + kRegs && W + kRegs < kBits - kTop;
      const int first = above_middle ? W + kRegs : kBits - kTop;
      for (int j = 0; j < W; ++j) l.regs[j] = j;
      for (int j = 0; j < kTop; ++j) l.regs[W + j] = first + j;
    }
    l.fill_threads(kBits);
    return l;
  }

  // The bits of the index transformed by mma, by pairs (k, m) of bits of its inner and outer index: see load_mma.
  __host__ __device__ static constexpr bool by_mma(int bit) { return Mma && bit >= 2 && bit <= 5; }

  // Whether register bit j is transformed in this layout: once, where it first can be, if it belongs to the order at all.
  __host__ __device__ static constexpr bool transforms(int which, int j) {
    const int bit = layout(which).regs[j];
    if (bit >= L || by_mma(bit)) return false;
    for (int earlier = Mma ? 1 : 0; earlier < which; ++earlier) {
      if (layout(earlier).holds(bit)) return false;
    }
    return !(Mma && which == 0);
  }

  __host__ __device__ static constexpr bool complete() {
    for (int bit = 0; bit < L; ++bit) {
      bool done = by_mma(bit);
      for (int which = 0; which < kLayouts; ++which) {
        for (int j = 0; j < kRegs; ++j) done |= layout(which).regs[j] == bit && transforms(which, j);
      }
      if (!done) return false;
    }
    return true;
  }

  // Where an element lives in shared memory: banks 4, 8 and 16 are exchanged by upper bits of the index, so that every
  // layout reaches 32 banks at once. Linear over xor, hence addresses are one xor (or a constant offset) from the thread's own.
  __host__ __device__ static constexpr int bank_of_bit(int bit) {
    if (Mma) return bit == 5 || bit == 8 ? 4 : bit == 9 ? 16 : 0;
    if (W == 3) return bit == 5 ? 4 : bit == kRegs + 3 ? 8 : bit == kRegs + 4 ? 16 : 0;
    return bit == kRegs + 2 ? 4 : bit == kRegs + 3 ? 8 : bit == kRegs + 4 ? 16 : 0;
  }
  __host__ __device__ static constexpr int swizzle(int element) {
    int s = element;
    for (int bit = 5; bit < kBits; ++bit) s ^= (element >> bit & 1) ? bank_of_bit(bit) : 0;
    return s;
  }

  // Lanes that the hardware serves together (8 for 16-byte accesses, 32 for 4-byte ones) must not meet in a bank.
  __host__ __device__ static constexpr bool conflict_free(int which) {
    const Layout l = layout(which);
    const bool vectors = l.regs[0] == 0 && l.regs[1] == 1;
    const int lanes = vectors ? 8 : 32, banks = vectors ? 8 : 32, shift = vectors ? 2 : 0;
    bool used[32] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      int e = 0;
      for (int j = 0; j < 5; ++j) e |= (lane >> j & 1) << l.threads[j];
      const int bank = (swizzle(e) >> shift) % banks;
      if (used[bank]) return false;
      used[bank] = true;
    }
    return true;
  }

  static_assert(complete());
  static_assert(!kShares || (conflict_free(Mma ? 1 : 0) && conflict_free(1) && conflict_free(kLayouts - 1)));
};

template <class P, int Which>
__device__ __forceinline__ int thread_element(int thread) {
  int e = 0;
  static_for<P::layout(Which).nthreads>([&](auto j) {
    constexpr int kLength = P::layout(Which).run_from(j.value), kBit = P::layout(Which).threads[j.value];
    if constexpr (kLength > 0) e |= (thread >> j.value & ((1 << kLength) - 1)) << kBit;
  });
  return e;
}

template <class P>
__device__ __forceinline__ int swizzle_thread(int element) {
  int s = element;
  static_for<P::kBits>([&](auto b) {
    constexpr int kBank = b.value >= 5 ? P::bank_of_bit(b.value) : 0;
    if constexpr (kBank != 0) s ^= (element >> b.value & 1) * kBank;
  });
  return s;
}

template <class P, int Which, class A>
__device__ __forceinline__ void transform_registers(A (&v)[P::kValues]) {
  static_for<P::kRegs>([&](auto j) {
    constexpr bool kHere = P::transforms(Which, j.value);
    if constexpr (kHere) butterfly<j.value>(v);
  });
}

// Writes (or reads) the tile in layout Which to shared memory, four words at a time where the layout holds bits 0 and 1.
template <class P, int Which, bool Write>
__device__ __forceinline__ void exchange(shared_ptr<float> memory, float (&v)[P::kValues], int thread) {
  const int base = swizzle_thread<P>(thread_element<P, Which>(thread));
  constexpr Layout kLayout = P::layout(Which);
  constexpr bool kVectors = kLayout.regs[0] == 0 && kLayout.regs[1] == 1;
  constexpr int kStep = kVectors ? 4 : 1;
  static_for<P::kValues / kStep>([&](auto i) {
    constexpr int kFirst = i.value * kStep;
    constexpr int kPlace = P::swizzle(P::layout(Which).element(kFirst));
    const auto at = memory + ((base ^ (kPlace & 31)) + (kPlace & ~31));
    if constexpr (kVectors) {
      using V = Vec<float, 4>;
      if constexpr (Write) {
        store_shared(at, V{{v[kFirst], v[kFirst + 1], v[kFirst + 2], v[kFirst + 3]}});
      } else {
        const V loaded = load_shared<V>(at);
        TORCHLIN_UNROLL
        for (int e = 0; e < 4; ++e) v[kFirst + e] = loaded[e];
      }
    } else if constexpr (Write) {
      *at = v[kFirst];
    } else {
      v[kFirst] = *at;
    }
  });
}

template <class P>
__device__ __forceinline__ void synchronize() {
  if constexpr (P::kTileThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Where a vector of the tile lies. Vectors of orders below a vector's length cross rows: those then lie a fixed stride apart.
struct Place {
  int64_t row;
  int position;  // in the row
  Offsets at;    // of the row
};

template <class P>
__device__ __forceinline__ Place locate(const Operands<float>& p, int64_t row0, const Offsets& at0, int element) {
  const int position = element & ((1 << P::kOrderBits) - 1);
  if constexpr (P::kRowBits == 0) return {row0, position, at0};
  const int64_t row = row0 + (element >> P::kOrderBits);
  if constexpr (P::kOrderBits < P::kVectorBits) {
    return {row, position, {row * p.map.x[0], row * p.map.y[0], row * p.map.signs[0]}};
  } else {
    return {row, position, row_offsets(p.map, row)};
  }
}

// f(element, index of its row after the vector's, index in its row) for every element of a vector that exists.
template <class P, class F>
__device__ __forceinline__ void for_each_element(const Operands<float>& p, const Place& place, F&& f) {
  static_for<P::kVector>([&](auto e) {
    constexpr int kRow = e.value >> P::kOrderBits, kAt = e.value & ((1 << P::kOrderBits) - 1);
    if (place.row + kRow < p.rows) f(e, kRow, place.position + kAt);
  });
}

template <class P>
__device__ __forceinline__ bool is_whole(const Operands<float>& p, const Place& place) {
  constexpr int kLastRow = (P::kVector - 1) >> P::kOrderBits;
  return place.row + kLastRow < p.rows;
}

template <class P>
__device__ __forceinline__ void multiply_signs(const Operands<float>& p, const float* signs, const Place& place, float* v) {
  const float* from = signs + place.at.signs;
  if (P::kOrderBits >= P::kVectorBits && p.sign_vector) {
    if (place.row >= p.rows) return;
    static_for<P::kVector / 4>([&](auto q) {
      const auto four = load_vec<Vec<float, 4>>(from + place.position + 4 * q.value);
      static_for<4>([&](auto e) { v[4 * q.value + e.value] *= four[e.value]; });
    });
  } else {
    for_each_element<P>(p, place, [&](auto e, int row, int at) { v[e.value] *= from[row * p.map.signs[0] + at]; });
  }
}

template <class P, class T>
__device__ __forceinline__ Vec<T, P::kVector> load_elements(const Operands<float>& p, const Place& place) {
  const T* x = static_cast<const T*>(p.x) + place.at.x;
  if (p.x_vector && is_whole<P>(p, place)) return load_vec<Vec<T, P::kVector>>(x + place.position);
  Vec<T, P::kVector> v;
  static_for<P::kVector>([&](auto e) { v[e.value] = static_cast<T>(0.0f); });
  for_each_element<P>(p, place, [&](auto e, int row, int at) { v[e.value] = x[row * p.map.x[0] + at]; });
  return v;
}

// A vector of the thread's next tile on its way through shared memory. Each thread waits for and reads only its own copies.
template <class P>
__device__ __forceinline__ shared_ptr<uint32_t> staged(int vector, int thread) {
  return shared_cast<uint32_t>(dynamic_shared<float>()) + P::kTile * P::kGroups + (vector * P::kThreads + thread) * 4;
}

template <class P, class T>
__device__ __forceinline__ void prefetch(const Operands<float>& p, int64_t row, int thread) {
  if (row < p.rows) {
    const T* x = static_cast<const T*>(p.x) + row_offsets(p.map, row).x + thread_element<P, 0>(thread);
    static_for<P::kValues / P::kVector>([&](auto q) {
      constexpr int kFirst = P::layout(0).element(q.value * P::kVector);
      cp_async_16(staged<P>(q.value, thread), x + kFirst);
    });
  }
  cp_async_commit();
}

// Four stages by mma. Its inner index k has the bits (register pair, lane 0, lane 1, register half) = index bits 2, 3, 4, 5, its
// outer index m the bits (lane 2, lane 3, lane 4, half of D) = index bits 3, 4, 5, 2. A holds the Hadamard matrix over those bits
// that belong to the order, the identity over the others.
template <class P, class T>
__device__ __forceinline__ void load_mma(const Operands<float>& p, int64_t row0, const Offsets& at0, int thread,
                                         float (&v)[P::kValues]) {
  constexpr uint32_t kOne = std::is_same_v<T, Half> ? 0x3C00 : 0x3F80;
  const int lane = thread & 31;
  uint32_t a[4];
  static_for<4>([&](auto i) {
    a[i.value] = 0;
    static_for<2>([&](auto half) {
      const int k = (lane & 3) << 1 | half.value | (i.value >> 1) << 3;
      const int m3 = i.value & 1, m = lane >> 2;  // m without its top bit
      const int m_of_k = m << 1 | m3;             // bits in the order of k
      constexpr int kOfOrder = P::kOrderBits >= 6 ? 15 : (1 << (P::kOrderBits - 2)) - 1;
      const bool nonzero = ((k ^ m_of_k) & ~kOfOrder) == 0;
      int parity = k & m_of_k & kOfOrder;
      parity ^= parity >> 2;
      parity ^= parity >> 1;
      a[i.value] |= (nonzero ? kOne | (parity & 1) << 15 : 0) << 16 * half.value;
    });
  });
  const int base = thread_element<P, 0>(thread);
  struct Words {
    uint32_t w[4];
  };
  Words raw[P::kValues / 8];
  static_for<P::kValues / 8>([&](auto q) {
    constexpr int kFirst = P::layout(0).element(q.value * 8);
    raw[q.value] = bits_as<Words>(load_elements<P, T>(p, locate<P>(p, row0, at0, base + kFirst)));
  });
  static_for<P::kValues / 16>([&](auto upper) {
    static_for<4>([&](auto s) {
      constexpr int kWord = s.value / 2;
      constexpr uint32_t kPick = s.value % 2 ? 0x7632 : 0x5410;
      uint32_t b[2];
      static_for<2>([&](auto half) {
        const Words& r = raw[upper.value * 2 + half.value];
        b[half.value] = byte_permute(r.w[kWord], r.w[kWord + 2], kPick);
      });
      float d[4] = {0, 0, 0, 0};
      mma_m16n8k16<T>(d, a, b);
      static_for<4>([&](auto i) {
        v[s.value | (i.value >> 1) << 2 | (i.value & 1) << 3 | upper.value << 4] = d[i.value];
      });
    });
  });
}

template <class P, class T>
__device__ __forceinline__ void load_tile(const Operands<float>& p, int64_t row0, const Offsets& at0, int thread,
                                          bool prefetched, float (&v)[P::kValues]) {
  const int base = thread_element<P, 0>(thread);
  if constexpr (P::kCanPrefetch) {
    if (prefetched) cp_async_wait<0>();
  }
  static_for<P::kValues / P::kVector>([&](auto q) {
    constexpr int kFirst = P::layout(0).element(q.value * P::kVector);
    using V = Vec<T, P::kVector>;
    const Place place = locate<P>(p, row0, at0, base + kFirst);
    V raw;
    if (P::kCanPrefetch && prefetched) {
      raw = load_shared<V>(staged<P>(q.value, thread));
    } else {
      raw = load_elements<P, T>(p, place);
    }
    static_for<P::kVector>([&](auto e) { v[q.value * P::kVector + e.value] = widen(raw[e.value]); });
    if (p.pre) multiply_signs<P>(p, p.pre, place, v + q.value * P::kVector);
  });
}

template <class P, class T>
__device__ __forceinline__ void store_tile(const Operands<float>& p, int64_t row0, const Offsets& at0, int thread,
                                           float (&v)[P::kValues]) {
  constexpr int kLast = P::kLayouts - 1;
  const int base = thread_element<P, kLast>(thread);
  static_for<P::kValues / P::kVector>([&](auto q) {
    constexpr int kFirst = P::layout(kLast).element(q.value * P::kVector);
    const Place place = locate<P>(p, row0, at0, base + kFirst);
    if (p.post) multiply_signs<P>(p, p.post, place, v + q.value * P::kVector);
    Vec<T, P::kVector> out;
    static_for<P::kVector>([&](auto e) { out[e.value] = narrow<T>(v[q.value * P::kVector + e.value] * p.scale); });
    T* y = static_cast<T*>(p.y) + place.at.y;
    if (p.y_vector && is_whole<P>(p, place)) {
      store_vec(y + place.position, out);
    } else {
      for_each_element<P>(p, place, [&](auto e, int row, int at) { y[row * p.map.y[0] + at] = out[e.value]; });
    }
  });
}

// `prefetches`: the launch gave shared memory for the next tile's input, and x is aligned. Only where P::kCanPrefetch.
template <class P, class Tin, class Tout>
__global__ void __launch_bounds__(P::kThreads, P::kMinBlocks) fwht_rows(const Operands<float> p, const bool prefetches) {
  const int thread = static_cast<int>(threadIdx.x) % P::kTileThreads, group = static_cast<int>(threadIdx.x) / P::kTileThreads;
  const auto memory = dynamic_shared<float>() + group * P::kTile;
  const int64_t step = static_cast<int64_t>(gridDim.x) * P::kGroups << P::kRowBits;
  const int64_t offset = static_cast<int64_t>(group) << P::kRowBits;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * P::kGroups << P::kRowBits;
  if constexpr (P::kCanPrefetch) {
    if (prefetches) prefetch<P, Tin>(p, first + offset, thread);
  }
  for (int64_t block_row = first; block_row < p.rows; block_row += step) {
    const int64_t row0 = block_row + offset;
    Offsets at0{};
    if constexpr (P::kRowBits == 0) at0 = row_offsets(p.map, row0);
    float v[P::kValues];
    if constexpr (P::kMma) {
      load_mma<P, Tin>(p, row0, at0, thread, v);
      transform_registers<P, 1>(v);
    } else {
      load_tile<P, Tin>(p, row0, at0, thread, P::kCanPrefetch && prefetches, v);
      transform_registers<P, 0>(v);
    }
    if constexpr (P::kShares) {
      exchange<P, P::kMma ? 1 : 0, true>(memory, v, thread);
      synchronize<P>();
      if constexpr (P::kCanPrefetch) {
        if (prefetches) prefetch<P, Tin>(p, row0 + step, thread);
      }
      if constexpr (!P::kMma) {
        // A thread writes back the very words it read: no barrier between.
        exchange<P, 1, false>(memory, v, thread);
        transform_registers<P, 1>(v);
        exchange<P, 1, true>(memory, v, thread);
        synchronize<P>();
      }
      exchange<P, P::kLayouts - 1, false>(memory, v, thread);
      transform_registers<P, P::kLayouts - 1>(v);
    }
    store_tile<P, Tout>(p, row0, at0, thread, v);
    if constexpr (P::kShares) synchronize<P>();
  }
}

}  // namespace torchlin::hadamard
