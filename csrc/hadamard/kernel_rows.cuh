// Powers of two along a contiguous axis: each element is read once and written once, in 16-byte vectors.
//
// A tile is 2^kBits consecutive elements: one row, or as many short rows as give a warp its work. Every
// thread holds 2^kRegs of them. Which bits of the element's index select the register, and which the thread,
// is a Layout. A stage over bit b costs an add per element wherever b is a register bit; between layouts,
// values change hands once through shared memory, instead of once per stage through shuffles:
//
//   registers      vector bits + top bits  |  kRegs middle bits  |  vector bits + the rest: two exchanges
//   tensor cores   stages 2 .. 5 by mma, which on the way hands one lane bit to a register, and all other
//   register bits by adds:
//                  kRegs + 3 bits with no exchange (orders to 2^8), 2 kRegs with one (to 2^12), and a third
//                  layout beyond
//
// The mma multiplies 16-bit inputs by +-1 and adds 16 of them in fp32: as exact as the adds it replaces. At
// 2^12 it saves a third of the instructions and half of the shared-memory traffic (benchmarks/gpu_model.py).
// Later stages would first have to split each fp32 value into 16-bit parts, three or more instructions an
// element to save four adds, so they stay in registers. Where signs are multiplied in first, the product is
// no 16-bit number and the register path runs.
#pragma once

#include "gpu/cp_async.cuh"
#include "gpu/mma.cuh"
#include "hadamard/kernel.cuh"

namespace torchlin::hadamard {

inline constexpr int kMinMmaBits = 4, kMaxRowBits = 15;

// Bit j of a register number is bit regs[j] of the element's index in its tile; bit j of a thread number is
// bit threads[j].
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
  // Hands the bits that no register holds to the threads, in ascending order: neighbours read neighbouring
  // addresses.
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
  static_assert(!Mma || (W == 3 && L >= kMinMmaBits));
  static constexpr int kRegs = Mma                       ? (L <= 7    ? 4
                                                            : L <= 10 ? 5
                                                                      : 6)
                               : L <= 9                  ? 4
                               : L <= (W == 2 ? 13 : 12) ? 5
                                                         : 6;
  static constexpr int kValues = 1 << kRegs;
  static constexpr int kBits = L > kRegs + 5 ? L : kRegs + 5;
  static constexpr int kTile = 1 << kBits;
  static constexpr int kRowBits = kBits - L;  // log2 of the rows in a tile
  static constexpr int kTileThreads = 1 << (kBits - kRegs);
  static constexpr int kGroups =
      kTileThreads >= 128 ? 1 : 128 / kTileThreads;  // tiles a block works on side by side
  static constexpr int kThreads = kTileThreads * kGroups;
  // Registers a thread may use: enough for its values and addresses, few enough to keep loads of other warps
  // in flight.
  static constexpr int kRegisterBudget = kRegs == 4 ? 80 : kRegs == 5 ? 96 : 128;
  static constexpr int kMinBlocks =
      65536 / kRegisterBudget / kThreads > 0 ? 65536 / kRegisterBudget / kThreads : 1;
  static constexpr int kLayouts = Mma ? (L <= 8 ? 2 : L <= 12 ? 3 : 4) : L <= W ? 1 : 3;
  static constexpr int kFirstTransformed = Mma ? 1 : 0;  // the layout that the values are in after loading
  static constexpr bool kShares = kLayouts > kFirstTransformed + 1;
  static constexpr size_t kExchangeBytes = kShares ? sizeof(float) * kTile * kGroups : 0;
  // A multiprocessor holds few tiles this large: nothing would hide the loads of the next ones, so they are
  // started early.
  static constexpr bool kCanPrefetch = W == 3 ? L >= 12 : L == 12 || L == 13;
  static constexpr size_t kPrefetchBytes = size_t{16} / kVector * kTile * kGroups;

  // The layouts in order. The first is loaded into, the last is stored from; with Mma, the second is what mma
  // leaves behind.
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
      for (l.nthreads = 5; l.nthreads < kBits - kRegs; ++l.nthreads)
        l.threads[l.nthreads] = l.nthreads + kRegs;
      return l;
    }
    l.nregs = kRegs;
    if (which == kLayouts - 2 && kLayouts > 2 && !(Mma && which == 1)) {
      for (int j = 0; j < kRegs; ++j) l.regs[j] = (Mma ? kBits - kRegs : W) + j;
    } else {
      // Vectors, and the top bits; the last layout takes the bits above the middle where the order has some
      // there.
      const bool above_middle = !Mma && which == 2 && L > W + kRegs && W + kRegs < kBits - kTop;
      const int first = above_middle ? W + kRegs : kBits - kTop;
      for (int j = 0; j < W; ++j) l.regs[j] = j;
      for (int j = 0; j < kTop; ++j) l.regs[W + j] = first + j;
    }
    l.fill_threads(kBits);
    return l;
  }

  // The bits of the index transformed by mma, by pairs (k, m) of bits of its inner and outer index: see
  // load_mma.
  __host__ __device__ static constexpr bool by_mma(int bit) { return Mma && bit >= 2 && bit <= 5; }

  // Whether register bit j is transformed in this layout: once, where it first can be, if it belongs to the
  // order at all.
  __host__ __device__ static constexpr bool transforms(int which, int j) {
    const int bit = layout(which).regs[j];
    if (bit >= L || by_mma(bit)) return false;
    for (int earlier = kFirstTransformed; earlier < which; ++earlier) {
      if (layout(earlier).holds(bit)) return false;
    }
    return which >= kFirstTransformed;
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

  // Where an element lives in shared memory: banks 4, 8 and 16 are exchanged by upper bits of the index, so
  // that every layout reaches 32 banks at once. Linear over xor, hence addresses are one xor (or a constant
  // offset) from the thread's own.
  __host__ __device__ static constexpr int bank_of_bit(int bit) {
    if (Mma) return bit == 5 || bit == kRegs + 3 ? 4 : bit == kRegs + 4 ? 16 : 0;
    if (W == 3) return bit == 5 ? 4 : bit == kRegs + 3 ? 8 : bit == kRegs + 4 ? 16 : 0;
    return bit == kRegs + 2 ? 4 : bit == kRegs + 3 ? 8 : bit == kRegs + 4 ? 16 : 0;
  }
  __host__ __device__ static constexpr int swizzle(int element) {
    int s = element;
    for (int bit = 5; bit < kBits; ++bit) s ^= (element >> bit & 1) ? bank_of_bit(bit) : 0;
    return s;
  }

  // Lanes that the hardware serves together (8 for 16-byte accesses, 32 for 4-byte ones) must not meet in a
  // bank.
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
  static_assert(!kShares || (conflict_free(kFirstTransformed) && conflict_free(kLayouts - 2) &&
                             conflict_free(kLayouts - 1)));
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

// Writes (or reads) the tile in layout Which to shared memory, four words at a time where the layout holds
// bits 0 and 1.
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

// Where a vector of the tile lies. Vectors of orders below a vector's length cross rows: those then lie a
// fixed stride apart.
struct Place {
  int64_t row;
  int position;  // in the row
  Offsets at;    // of the row
};

template <class P>
__device__ __forceinline__ Place locate(const Operands<float>& p, int64_t row0, const Offsets& at0,
                                        int element) {
  const int position = element & ((1 << P::kOrderBits) - 1);
  if constexpr (P::kRowBits == 0) return {row0, position, at0};
  const int64_t row = row0 + (element >> P::kOrderBits);
  if constexpr (P::kOrderBits < P::kVectorBits) {
    return {row, position, {row * p.map.x[0], row * p.map.y[0], row * p.map.signs[0]}};
  } else {
    return {row, position, row_offsets(p.map, row)};
  }
}

// f(element, index of its row after the vector's, index in its row) for every element of a vector that
// exists.
template <class P, class F>
__device__ __forceinline__ void for_each_element(const Operands<float>& p, const Place& place, F&& f) {
  static_for<P::kVector>([&](auto e) {
    constexpr int kRow = e.value >> P::kOrderBits, kAt = e.value & ((1 << P::kOrderBits) - 1);
    if (place.row + kRow < p.rows) f(e, kRow, place.position + kAt);
  });
}

// f(index of the vector among the thread's registers, its place) for each vector of layout Which.
template <class P, int Which, class F>
__device__ __forceinline__ void for_each_vector(const Operands<float>& p, int64_t row0, const Offsets& at0,
                                                int thread, F&& f) {
  const int base = thread_element<P, Which>(thread);
  static_for<P::kValues / P::kVector>([&](auto q) {
    constexpr int kFirst = P::layout(Which).element(q.value * P::kVector);
    f(q, locate<P>(p, row0, at0, base + kFirst));
  });
}

// `whole`: every row of the tile exists. All branches here and below are taken by whole tiles, outside the
// loops over vectors: a branch around each load would make each wait for the one before.
template <class P, int Which>
__device__ __forceinline__ void multiply_signs(const Operands<float>& p, const float* signs, int64_t row0,
                                               const Offsets& at0, int thread, bool whole,
                                               float (&v)[P::kValues]) {
  if (P::kOrderBits >= P::kVectorBits && p.sign_vector && whole) {
    for_each_vector<P, Which>(p, row0, at0, thread, [&](auto q, const Place& place) {
      static_for<P::kVector / 4>([&](auto part) {
        const auto four = load_vec<Vec<float, 4>>(signs + place.at.signs + place.position + 4 * part.value);
        static_for<4>([&](auto e) { v[q.value * P::kVector + 4 * part.value + e.value] *= four[e.value]; });
      });
    });
  } else {
    for_each_vector<P, Which>(p, row0, at0, thread, [&](auto q, const Place& place) {
      for_each_element<P>(p, place, [&](auto e, int row, int at) {
        v[q.value * P::kVector + e.value] *= signs[place.at.signs + row * p.map.signs[0] + at];
      });
    });
  }
}

// A vector of the thread's next tile on its way through shared memory. Each thread waits for and reads only
// its own copies.
template <class P>
__device__ __forceinline__ shared_ptr<uint32_t> staged(int vector) {
  const int thread = static_cast<int>(threadIdx.x);
  return shared_cast<uint32_t>(dynamic_shared<float>()) + P::kTile * P::kGroups +
         (vector * P::kThreads + thread) * 4;
}

template <class P, class T>
__device__ __forceinline__ void prefetch(const Operands<float>& p, int64_t row, int thread) {
  if (row < p.rows) {
    const T* x = static_cast<const T*>(p.x) + row_offsets(p.map, row).x + thread_element<P, 0>(thread);
    static_for<P::kValues / P::kVector>([&](auto q) {
      constexpr int kFirst = P::layout(0).element(q.value * P::kVector);
      cp_async_16(staged<P>(q.value), x + kFirst);
    });
  }
  cp_async_commit();
}

// The thread's part of the input, in layout 0.
template <class P, class T>
__device__ __forceinline__ void load_input(const Operands<float>& p, int64_t row0, const Offsets& at0,
                                           int thread, bool whole, bool prefetched,
                                           Vec<T, P::kVector> (&raw)[P::kValues / P::kVector]) {
  using V = Vec<T, P::kVector>;
  const T* x = static_cast<const T*>(p.x);
  if (P::kCanPrefetch && prefetched) {
    static_for<P::kValues / P::kVector>([&](auto q) { raw[q.value] = load_shared<V>(staged<P>(q.value)); });
  } else if (p.x_vector && whole) {
    for_each_vector<P, 0>(p, row0, at0, thread, [&](auto q, const Place& place) {
      raw[q.value] = load_vec<V>(x + place.at.x + place.position);
    });
  } else {
    for_each_vector<P, 0>(p, row0, at0, thread, [&](auto q, const Place& place) {
      static_for<P::kVector>([&](auto e) { raw[q.value][e.value] = static_cast<T>(0.0f); });
      for_each_element<P>(p, place, [&](auto e, int row, int at) {
        raw[q.value][e.value] = x[place.at.x + row * p.map.x[0] + at];
      });
    });
  }
}

// Four stages by mma. Its inner index k has the bits (register pair, lane 0, lane 1, register half) = index
// bits 2, 3, 4, 5, its outer index m the bits (lane 2, lane 3, lane 4, half of D) = index bits 3, 4, 5, 2. A
// holds the Hadamard matrix over those bits that belong to the order, the identity over the others.
template <class P, class T>
__device__ __forceinline__ void transform_mma(const Vec<T, P::kVector> (&input)[P::kValues / P::kVector],
                                              int thread, float (&v)[P::kValues]) {
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
  struct Words {
    uint32_t w[4];
  };
  static_for<P::kValues / 16>([&](auto upper) {
    static_for<4>([&](auto s) {
      constexpr int kWord = s.value / 2;
      constexpr uint32_t kPick = s.value % 2 ? 0x7632 : 0x5410;
      uint32_t b[2];
      static_for<2>([&](auto half) {
        const auto r = bits_as<Words>(input[upper.value * 2 + half.value]);
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
__device__ __forceinline__ void store_output(const Operands<float>& p, int64_t row0, const Offsets& at0,
                                             int thread, bool whole, const float (&v)[P::kValues]) {
  T* y = static_cast<T*>(p.y);
  const auto rounded = [&](int q) {
    return narrow_vec<T, P::kVector>([&](int e) { return v[q * P::kVector + e] * p.scale; });
  };
  if (p.y_vector && whole) {
    for_each_vector<P, P::kLayouts - 1>(p, row0, at0, thread, [&](auto q, const Place& place) {
      store_vec(y + place.at.y + place.position, rounded(q.value));
    });
  } else {
    for_each_vector<P, P::kLayouts - 1>(p, row0, at0, thread, [&](auto q, const Place& place) {
      const auto out = rounded(q.value);
      for_each_element<P>(
          p, place, [&](auto e, int row, int at) { y[place.at.y + row * p.map.y[0] + at] = out[e.value]; });
    });
  }
}

// `prefetches`: the launch gave shared memory for the next tile's input, and x is aligned. Only where
// P::kCanPrefetch.
template <class P, class Tin, class Tout>
__global__ void __launch_bounds__(P::kThreads, P::kMinBlocks)
    fwht_rows(const Operands<float> p, const bool prefetches) {
  const int thread = static_cast<int>(threadIdx.x) % P::kTileThreads,
            group = static_cast<int>(threadIdx.x) / P::kTileThreads;
  const auto memory = dynamic_shared<float>() + group * P::kTile;
  const int64_t step = static_cast<int64_t>(gridDim.x) * P::kGroups << P::kRowBits;
  const int64_t offset = static_cast<int64_t>(group) << P::kRowBits;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * P::kGroups << P::kRowBits;
  if constexpr (P::kCanPrefetch) {
    if (prefetches) prefetch<P, Tin>(p, first + offset, thread);
  }
  for (int64_t block_row = first; block_row < p.rows; block_row += step) {
    const int64_t row0 = block_row + offset;
    const auto locate_tile = [&] { return P::kRowBits == 0 ? row_offsets(p.map, row0) : Offsets{}; };
    Offsets at0 = locate_tile();
    const bool prefetched = P::kCanPrefetch && prefetches;
    if constexpr (P::kCanPrefetch) {
      if (prefetched) cp_async_wait<0>();
    }
    const bool whole = row0 + (int64_t{1} << P::kRowBits) <= p.rows;
    Vec<Tin, P::kVector> input[P::kValues / P::kVector];
    load_input<P, Tin>(p, row0, at0, thread, whole, prefetched, input);
    float v[P::kValues];
    if constexpr (P::kMma) {
      transform_mma<P, Tin>(input, thread, v);
    } else {
      static_for<P::kValues>(
          [&](auto i) { v[i.value] = widen(input[i.value / P::kVector][i.value % P::kVector]); });
      if (p.pre) multiply_signs<P, 0>(p, p.pre, row0, at0, thread, whole, v);
    }
    transform_registers<P, P::kFirstTransformed>(v);
    static_for<P::kLayouts - 1 - P::kFirstTransformed>([&](auto i) {
      constexpr int kFrom = P::kFirstTransformed + i.value;
      // After the first exchange a thread writes back to the very words it read: no barrier between.
      exchange<P, kFrom, true>(memory, v, thread);
      synchronize<P>();
      if constexpr (P::kCanPrefetch && i.value == 0) {
        if (prefetched) prefetch<P, Tin>(p, row0 + step, thread);
      }
      exchange<P, kFrom + 1, false>(memory, v, thread);
      transform_registers<P, kFrom + 1>(v);
    });
    at0 = locate_tile();  // again, rather than held in registers all along
    if (p.post) multiply_signs<P, P::kLayouts - 1>(p, p.post, row0, at0, thread, whole, v);
    store_output<P, Tout>(p, row0, at0, thread, whole, v);
    if constexpr (P::kShares) synchronize<P>();
  }
}

}  // namespace torchlin::hadamard
