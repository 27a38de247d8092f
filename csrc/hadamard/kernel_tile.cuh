// The general kernel: orders K * 2^k, any strides, any type. A block works on a tile of 2^log_rows rows x n x
// 2^log_columns columns in shared memory; the columns are a second axis that is not transformed, contiguous
// where the transformed one is not.
//
// In shared memory the tile is [K][rows][2^k][columns], so that H_K acts across its slow index and the
// butterflies on a range of bits of the fast one, whatever K. The H_K product comes first, on the way in from
// global memory: there 16-bit inputs are still 16-bit numbers, and a tensor core multiplies them by +-1
// exactly.
#pragma once

#include "gpu/mma.cuh"
#include "hadamard/kernel.cuh"

namespace torchlin::hadamard {

inline constexpr int kTileThreads = 256;

template <class A>
struct TileOperands {
  Operands<A> op;
  const int8_t* had;  // [K][K], +-1, or null with K = 1
  bool transpose;     // multiply by H_K^T
  int K, log_n2, log_rows, log_columns;
  int64_t columns, x_column, y_column, sign_column;  // how many, and their strides
};

// Shared memory after the tile: one bit per entry of H_K (set where it is -1), in rows of whole words.
inline __host__ __device__ int sign_words(int K) { return (K + 31) / 32; }
inline __host__ __device__ int padded_rows(int K) { return (K + 15) / 16 * 16; }

// Exchanges the lower bank bits by upper bits of the index: accesses of 32 neighbours, of 32 elements 16
// apart, and of tensor-core fragments in tiles of 2^6 .. 2^8 columns all reach 32 banks.
__device__ __forceinline__ int swizzle_tile(int i) {
  return i ^ (i >> 5 & 15) ^ (i >> 4 & 16) ^ (i >> 8 & 6);
}

template <class A>
struct TileShape {
  int n2, cols, total;  // 2^k, elements per index of H_K, elements of the tile
  int64_t row0, column0;
  Offsets at0;  // of row0
};

struct Element {
  Offsets at;
  bool exists;  // else `at` is that of some element that does
};

// Element (kk, col) of the tile. No branch: loads of several elements can be in flight together.
template <class A>
__device__ __forceinline__ Element locate(const TileOperands<A>& p, const TileShape<A>& t, int kk, int col) {
  const int j = col >> p.log_columns & (t.n2 - 1);
  const int64_t row = t.row0 + (col >> (p.log_columns + p.log_n2)),
                column = t.column0 + (col & ((1 << p.log_columns) - 1));
  const bool exists = row < p.op.rows && column < p.columns && kk < p.K;
  const int64_t c = column < p.columns ? column : 0;
  const int64_t i = static_cast<int64_t>(kk < p.K ? kk : 0) * t.n2 + j;
  const Offsets o = p.log_rows == 0 ? t.at0 : row_offsets(p.op.map, row < p.op.rows ? row : t.row0);
  return {{o.x + i * p.op.x_stride + c * p.x_column, o.y + i * p.op.y_stride + c * p.y_column,
           o.signs + i * p.op.sign_stride + c * p.sign_column},
          exists};
}

// Bits of H_K by rows of its output (`by_output`) or of its input, for the whole life of the block.
template <class A>
__device__ __forceinline__ void pack_signs(const TileOperands<A>& p, shared_ptr<uint32_t> bits,
                                           bool by_output) {
  const int words = sign_words(p.K);
  const bool had_rows = by_output != p.transpose;  // the packed row is a row of `had`, not a column
  TORCHLIN_NO_UNROLL
  for (int w = static_cast<int>(threadIdx.x); w < padded_rows(p.K) * words; w += kTileThreads) {
    const int a = w / words, first = w % words * 32;
    uint32_t word = 0;
    for (int b = 0; a < p.K && b < 32 && first + b < p.K; ++b) {
      const int other = first + b;
      const int8_t entry = p.had[had_rows ? a * p.K + other : other * p.K + a];
      word |= static_cast<uint32_t>(entry < 0) << b;
    }
    bits[w] = word;
  }
}

template <class A>
__device__ __forceinline__ A flip(A v, uint32_t negative) {
  if constexpr (std::is_same_v<A, float>) {
    return bits_as<float>(bits_as<uint32_t>(v) ^ negative << 31);
  } else {
    return negative ? -v : v;
  }
}

// Global memory -> H_K -> shared memory with ordinary arithmetic: 16 outputs of a column at a time, from its
// K inputs. Sums of 16 are summed: the error of one long sum would grow with sqrt(K).
template <class T, class A>
__device__ __forceinline__ void load_tile_simt(const TileOperands<A>& p, const TileShape<A>& t,
                                               shared_ptr<A> tile, shared_ptr<uint32_t> bits) {
  if (p.K == 1) {
    constexpr int kBatch = 4;  // independent loads in flight
    TORCHLIN_NO_UNROLL
    for (int first = static_cast<int>(threadIdx.x); first < t.total; first += kTileThreads * kBatch) {
      A v[kBatch];
      TORCHLIN_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kTileThreads;
        const Element e = locate(p, t, 0, i < t.total ? i : 0);
        v[b] = static_cast<A>(widen(static_cast<const T*>(p.op.x)[e.at.x]));
        if (p.op.pre) v[b] *= p.op.pre[e.at.signs];
        if (!e.exists) v[b] = 0;
      }
      TORCHLIN_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kTileThreads;
        if (i < t.total) tile[swizzle_tile(i)] = v[b];
      }
    }
    return;
  }
  const int words = sign_words(p.K), chunks = padded_rows(p.K) / 16;
  TORCHLIN_NO_UNROLL
  for (int task = static_cast<int>(threadIdx.x); task < chunks * t.cols; task += kTileThreads) {
    const int chunk = task / t.cols, col = task % t.cols;
    const Element column = locate(p, t, 0, col);
    A sum[16];
    TORCHLIN_UNROLL
    for (int u = 0; u < 16; ++u) sum[u] = 0;
    TORCHLIN_NO_UNROLL
    for (int k0 = 0; k0 < p.K; k0 += 16) {
      A part[16];
      TORCHLIN_UNROLL
      for (int u = 0; u < 16; ++u) part[u] = 0;
      TORCHLIN_NO_UNROLL
      for (int kk = k0; kk < k0 + 16 && kk < p.K; ++kk) {
        const int64_t i = static_cast<int64_t>(kk) * t.n2;
        A v = static_cast<A>(widen(static_cast<const T*>(p.op.x)[column.at.x + i * p.op.x_stride]));
        if (p.op.pre) v *= p.op.pre[column.at.signs + i * p.op.sign_stride];
        if (!column.exists) v = 0;
        const uint32_t column_bits = static_cast<uint32_t>(bits[kk * words + chunk / 2]) >> chunk % 2 * 16;
        TORCHLIN_UNROLL
        for (int u = 0; u < 16; ++u) part[u] += flip(v, column_bits >> u & 1);
      }
      TORCHLIN_UNROLL
      for (int u = 0; u < 16; ++u) sum[u] += part[u];
    }
    TORCHLIN_UNROLL
    for (int u = 0; u < 16; ++u) {
      const int i = chunk * 16 + u;
      if (i < p.K) tile[swizzle_tile(i * t.cols + col)] = sum[u];
    }
  }
}

template <class T>
__device__ __forceinline__ Vec<T, 8> load_eight(const T* x, bool exists) {
  Vec<T, 8> v;
  constexpr int kStep = kVectorBytes / sizeof(T) < 8 ? kVectorBytes / sizeof(T) : 8;
  static_for<8 / kStep>([&](auto q) {
    const auto part = load_vec<Vec<T, kStep>>(x + q.value * kStep);
    static_for<kStep>(
        [&](auto e) { v[q.value * kStep + e.value] = exists ? part[e.value] : static_cast<T>(0.0f); });
  });
  return v;
}

// The top half of a float: its sign, exponent and first 8 bits. What is left, v - high_part(v), is exact. NaN
// stays NaN.
__device__ __forceinline__ uint32_t high_part(float v) {
  return v == v ? bits_as<uint32_t>(v) & 0xFFFF0000u : 0x7FC00000u;
}

// Global memory -> H_K on tensor cores -> shared memory, a warp doing 64 columns x 16 outputs at a time. A
// lane's columns are its own vectors: column 8 g + s of the 64 is column g of fragment s.
//
// 16-bit inputs without signs are used as they are. Everything else is cut into bfloat16 parts of 8 bits,
// three at most, which sum to the float exactly; parts that are zero throughout the warp are skipped.
// Products of parts are exact, but tensor cores cut sums off where fp32 rounds them, and over K / 16 steps
// that bias would show in float results. So there each step starts from zero, apart for the upper part (whose
// sum of 16 fits) and the lower ones, and is added to the rest by ordinary adds.
template <class T>
__device__ __forceinline__ void load_tile_mma(const TileOperands<float>& p, const TileShape<float>& t,
                                              shared_ptr<float> tile, shared_ptr<uint32_t> bits) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, q = lane % 4;
  const int words = sign_words(p.K), row_tiles = padded_rows(p.K) / 16;
  const bool as_is = sizeof(T) == 2 && !p.op.pre;
  const uint32_t ones = as_is && std::is_same_v<T, Half> ? 0x3C003C00u : 0x3F803F80u;
  TORCHLIN_NO_UNROLL
  for (int task = warp; task < row_tiles * (t.cols / 64); task += kTileThreads / 32) {
    const int column0 = task / row_tiles * 64, column = column0 + g * 8, m0 = task % row_tiles * 16 + g;
    const Element place = locate(p, t, 0, column);
    float d[8][4] = {};
    TORCHLIN_NO_UNROLL
    for (int k0 = 0; k0 < p.K; k0 += 16) {
      // A fragment of H_K from its sign bits; beyond K there are ones, which meet zeros in x or make rows
      // that nobody stores.
      uint32_t a[4];
      static_for<2>([&](auto half) {
        const uint32_t row =
            static_cast<uint32_t>(bits[(m0 + 8 * half.value) * words + k0 / 32]) >> (k0 % 32 + 2 * q);
        a[half.value] = ones | (row & 1) << 15 | (row & 2) << 30;
        a[half.value + 2] = ones | (row >> 8 & 1) << 15 | (row >> 8 & 2) << 30;
      });
      Vec<T, 8> x[4];  // rows 2q, 2q + 1, 2q + 8, 2q + 9 of these 16
      int row[4];
      static_for<4>([&](auto i) {
        const int kk = k0 + 2 * q + i.value % 2 + i.value / 2 * 8;
        row[i.value] = (kk < p.K ? kk : 0) * t.n2;
        x[i.value] =
            load_eight(static_cast<const T*>(p.op.x) + place.at.x + row[i.value], place.exists && kk < p.K);
      });
      if constexpr (sizeof(T) == 2) {
        if (as_is) {
          static_for<8>([&](auto s) {
            const auto pair = [&](int i) {
              return bits_as<uint16_t>(x[i][s.value]) |
                     static_cast<uint32_t>(bits_as<uint16_t>(x[i + 1][s.value])) << 16;
            };
            const uint32_t b[2] = {pair(0), pair(2)};
            mma_m16n8k16<T>(d[s.value], a, b);
          });
          continue;
        }
      }
      if constexpr (sizeof(T) == 4) {
        // In place and ahead of the rest: that leaves no register to spill.
        if (p.op.pre) {
          static_for<32>([&](auto i) {
            x[i.value / 8][i.value % 8] *= p.op.pre[place.at.signs + (row[i.value / 8] + i.value % 8)];
          });
        }
      }
      static_for<8>([&](auto s) {
        float rest[4];
        static_for<4>([&](auto i) {
          rest[i.value] = widen(x[i.value][s.value]);
          if (sizeof(T) == 2 && p.op.pre)
            rest[i.value] *= p.op.pre[place.at.signs + (row[i.value] + s.value)];
        });
        uint32_t b[2], left = 0;
        const auto cut = [&] {
          uint32_t part[4];
          left = 0;
          static_for<4>([&](auto i) {
            part[i.value] = high_part(rest[i.value]);
            const float r = rest[i.value] - bits_as<float>(part[i.value]);
            rest[i.value] = r == r ? r : 0.0f;  // an infinity or a NaN leaves nothing
            left |= bits_as<uint32_t>(rest[i.value]);
          });
          b[0] = byte_permute(part[0], part[1], 0x7632);
          b[1] = byte_permute(part[2], part[3], 0x7632);
        };
        float upper[4] = {}, lower[4] = {};
        cut();
        mma_m16n8k16<BFloat16>(upper, a, b);
        if (__any_sync(0xffffffffu, (left & 0x7FFFFFFFu) != 0)) {
          cut();
          mma_m16n8k16<BFloat16>(lower, a, b);
          cut();
          mma_m16n8k16<BFloat16>(lower, a, b);
        }
        static_for<4>([&](auto i) { d[s.value][i.value] += upper[i.value] + lower[i.value]; });
      });
    }
    // A thread now holds 16 consecutive columns, index 8 i + s, of two rows: four stages on the spot.
    static_for<2>([&](auto half) {
      float v[16];
      static_for<16>([&](auto u) { v[u.value] = d[u.value % 8][half.value * 2 + u.value / 8]; });
      butterfly<0>(v);
      butterfly<1>(v);
      butterfly<2>(v);
      if (p.log_n2 > 3) butterfly<3>(v);
      const int m = m0 + 8 * half.value, first = m * t.cols + column0 + q * 16;
      if (m < p.K) {
        static_for<16>([&](auto u) { tile[swizzle_tile(first + u.value)] = v[u.value]; });
      }
    });
  }
}

// Butterflies over M bits of the tile's index from bit `shift` on, in place.
template <int M, class A>
__device__ __forceinline__ void transform_tile(shared_ptr<A> tile, int total, int shift) {
  TORCHLIN_NO_UNROLL
  for (int task = static_cast<int>(threadIdx.x); task < total >> M; task += kTileThreads) {
    const int first = task >> shift << (shift + M) | (task & ((1 << shift) - 1));
    A v[1 << M];
    TORCHLIN_UNROLL
    for (int u = 0; u < 1 << M; ++u) v[u] = tile[swizzle_tile(first + (u << shift))];
    static_for<M>([&](auto j) { butterfly<j.value>(v); });
    TORCHLIN_UNROLL
    for (int u = 0; u < 1 << M; ++u) tile[swizzle_tile(first + (u << shift))] = v[u];
  }
}

template <class T, class A>
__device__ __forceinline__ void store_shared_tile(const TileOperands<A>& p, const TileShape<A>& t,
                                                  shared_ptr<A> tile) {
  T* y = static_cast<T*>(p.op.y);
  constexpr int kVector = kVectorBytes / sizeof(T);
  if (p.op.y_vector) {
    TORCHLIN_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < t.total / kVector; i += kTileThreads) {
      const int first = i * kVector;
      const Element place = locate(p, t, first / t.cols, first % t.cols);
      const auto out = narrow_vec<T, kVector>([&](int e) {
        A v = tile[swizzle_tile(first + e)];
        if (p.op.post) v *= p.op.post[place.at.signs + e * p.op.sign_stride];
        return v * p.op.scale;
      });
      if (place.exists) store_vec(y + place.at.y, out);
    }
    return;
  }
  TORCHLIN_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < t.total; i += kTileThreads) {
    const Element place = locate(p, t, i / t.cols, i % t.cols);
    A v = tile[swizzle_tile(i)];
    if (p.op.post) v *= p.op.post[place.at.signs];
    if (place.exists) y[place.at.y] = narrow<T>(v * p.op.scale);
  }
}

// As many blocks on a multiprocessor as the registers allow without spills.
template <class Tout, bool Mma>
inline constexpr int kTileBlocks = Mma || std::is_same_v<Tout, double> ? 2 : 3;

template <class Tin, class Tout, bool Mma>
__global__ void __launch_bounds__(kTileThreads, (kTileBlocks<Tout, Mma>))
    fwht_tile(const TileOperands<accumulate_t<Tout>> p) {
  using A = accumulate_t<Tout>;
  TileShape<A> t;
  t.n2 = 1 << p.log_n2;
  t.cols = 1 << (p.log_n2 + p.log_rows + p.log_columns);
  t.total = p.K * t.cols;
  const auto tile = dynamic_shared<A>();
  // The swizzle stays within blocks of 32 elements.
  const auto bits = shared_cast<uint32_t>(tile + (t.total + 31) / 32 * 32);
  if (p.K > 1) {
    pack_signs(p, bits, Mma);
    __syncthreads();
  }
  const int64_t column_tiles = (p.columns + (int64_t{1} << p.log_columns) - 1) >> p.log_columns;
  const int64_t row_tiles = (p.op.rows + (int64_t{1} << p.log_rows) - 1) >> p.log_rows;
  for (int64_t b = blockIdx.x; b < row_tiles * column_tiles; b += gridDim.x) {
    t.row0 = (b / column_tiles) << p.log_rows;
    t.column0 = (b % column_tiles) << p.log_columns;
    t.at0 = row_offsets(p.op.map, t.row0);
    int bit = 0;
    if constexpr (Mma) {
      load_tile_mma<Tin>(p, t, tile, bits);
      bit = p.log_n2 < 4 ? p.log_n2 : 4;
    } else {
      load_tile_simt<Tin>(p, t, tile, bits);
    }
    __syncthreads();
    while (bit < p.log_n2) {
      const int left = p.log_n2 - bit, shift = bit + p.log_columns;
      if (left >= 4) transform_tile<4>(tile, t.total, shift), bit += 4;
      else if (left == 3) transform_tile<3>(tile, t.total, shift), bit += 3;
      else if (left == 2) transform_tile<2>(tile, t.total, shift), bit += 2;
      else transform_tile<1>(tile, t.total, shift), bit += 1;
      __syncthreads();
    }
    store_shared_tile<Tout>(p, t, tile);
    __syncthreads();
  }
}

}  // namespace torchlin::hadamard
