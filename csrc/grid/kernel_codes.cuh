// Encode, decode, pack, unpack and dequantize: what is done once a model or far from the inner loop.
#pragma once

#include "grid/codes.cuh"

namespace torchlin::grid {

inline constexpr int kCodeThreads = 256;

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kCodeThreads + threadIdx.x;
}

// ---- encode

struct Encode {
  const float *x, *grid;
  void* codes;
  int64_t rows, k, vectors;  // vectors of a row
  int n, p;
  int tile;  // points in shared memory at a time
};

// Exact float32: a square and a sum are two roundings, coordinate by coordinate, as plain torch makes them; equally near
// points are seen as equal whatever the order of their coordinates. `Ragged`: missing coordinates do not count.
template <int P, bool Ragged>
__device__ __forceinline__ float distance(const float (&z)[P], const Vec<float, P>& c, int present) {
  float sum = 0;
  static_for<P>([&](auto i) {
    float d = z[i.value] - c[i.value];
    if (Ragged && i.value >= present) d = 0;
#if defined(__CUDACC__)
    sum = i.value == 0 ? __fmul_rn(d, d) : __fadd_rn(sum, __fmul_rn(d, d));
#else
    const volatile float square = d * d;  // g++ would contract the two
    sum = i.value == 0 ? square : sum + square;
#endif
  });
  return sum;
}

template <int P>
__device__ __forceinline__ Vec<float, P> load_point(shared_ptr<float> at) {
  if constexpr (P == 1) {
    return {{static_cast<float>(*at)}};
  } else if constexpr (P <= 4) {
    return load_shared<Vec<float, P>>(at);
  } else {
    const auto low = load_shared<Vec<float, 4>>(at), high = load_shared<Vec<float, 4>>(at + 4);
    return {{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}};
  }
}

// A thread finds the code of one vector. All lanes read the same point at the same time: one access for the warp.
template <int P>
__global__ void __launch_bounds__(kCodeThreads) grid_encode(Encode a) {
  const shared_ptr<float> points = dynamic_shared<float>();
  const int64_t vector = global_thread(), count = a.rows * a.vectors;
  const int64_t row = vector / a.vectors, first = (vector - row * a.vectors) * a.p;
  const bool exists = vector < count;
  const int present = a.k - first < a.p ? static_cast<int>(a.k - first) : a.p;
  float z[P];
  static_for<P>([&](auto i) { z[i.value] = exists && i.value < present ? a.x[row * a.k + first + i.value] : 0.0f; });
  float nearest = __builtin_huge_valf();
  int code = 0;
  TORCHLIN_NO_UNROLL
  for (int begin = 0; begin < a.n; begin += a.tile) {
    const int here = smaller_of(a.tile, a.n - begin);
    if (begin > 0) __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < here * P; i += kCodeThreads) {
      const int q = i % P;
      points[i] = q < a.p ? a.grid[static_cast<int64_t>(begin + i / P) * a.p + q] : 0.0f;
    }
    __syncthreads();
    const auto search = [&](auto ragged) {
#if defined(__CUDACC__)
#pragma unroll 4
#endif
      for (int i = 0; i < here; ++i) {
        const float d = distance<P, decltype(ragged)::value>(z, load_point<P>(points + i * P), present);
        if (d < nearest) nearest = d, code = begin + i;
      }
    };
    if (present == a.p) search(std::false_type{});
    else search(std::true_type{});
  }
  if (exists) store_code(a.codes, a.n > 256, vector, static_cast<uint32_t>(code));
}

// ---- decode

struct Decode {
  const void* codes;
  const float* grid;
  float* out;
  int64_t count;
  int n, p;
};

static __global__ void __launch_bounds__(kCodeThreads) grid_decode(Decode a) {
  const int64_t i = global_thread(), vector = i / a.p;
  if (vector >= a.count) return;
  uint32_t code = load_code(a.codes, a.n > 256, vector);
  if (code >= static_cast<uint32_t>(a.n)) code = static_cast<uint32_t>(a.n) - 1;
  a.out[i] = a.grid[code * a.p + static_cast<int>(i - vector * a.p)];
}

// ---- pack and unpack

struct Pack {
  void* codes;
  uint8_t* packed;
  int64_t rows, count, words;  // of a row: codes and words
  int64_t row_bytes;
  int width, digits;
  Radix radix;
};

// Eight words are a whole number of bytes: a thread makes those.
static __global__ void __launch_bounds__(kCodeThreads) grid_pack(Pack a) {
  const int64_t groups = (a.words + 7) / 8, row = global_thread() / groups, group = global_thread() - row * groups;
  if (row >= a.rows) return;
  uint8_t* const row_end = a.packed + (row + 1) * a.row_bytes;
  uint8_t* to = a.packed + row * a.row_bytes + group * a.width;
  uint64_t bits = 0;
  int held = 0;
  const auto put = [&](uint64_t value, int count) {  // at most 32, on top of at most 7
    bits |= value << held;
    for (held += count; held >= 8; held -= 8, bits >>= 8) {
      if (to < row_end) *to++ = static_cast<uint8_t>(bits);
    }
  };
  TORCHLIN_NO_UNROLL
  for (int64_t w = group * 8; w < group * 8 + 8; ++w) {
    uint64_t word = 0;
    for (int d = a.digits; d-- > 0;) {
      const int64_t i = w * a.digits + d;
      word = word * a.radix.n + (i < a.count ? load_code(a.codes, a.radix.n > 256, row * a.count + i) : 0);
    }
    put(word & 0xffffffffu, smaller_of(a.width, 32));
    if (a.width > 32) put(word >> 32, a.width - 32);
  }
}

static __global__ void __launch_bounds__(kCodeThreads) grid_unpack(Pack a) {
  const int64_t row = global_thread() / a.words, w = global_thread() - row * a.words;
  if (row >= a.rows) return;
  const Rows rows{a.packed, a.row_bytes, a.width, a.digits, 1, a.radix};
  uint64_t segment = load_segment(rows, start_of(rows, row), static_cast<int>(w)), word = take_word(rows, segment);
  TORCHLIN_NO_UNROLL
  for (int d = 0; d < a.digits; ++d) {
    const uint32_t digit = next_digit(rows, word, d);
    const int64_t i = w * a.digits + d;
    if (i < a.count) store_code(a.codes, a.radix.n > 256, row * a.count + i, digit);
  }
}

// ---- dequantize

struct Dequantize {
  Rows rows;
  const float* grid;
  const void* scales;
  void* out;
  Type type;  // of out
  bool half_scales;
  bool vectors;  // four numbers can be stored at a time
  int64_t first_row, row_count;
  int in_features, n, p, blocks, block_size, segments;
};

// A thread decodes a segment. P is p, or 0 for those that are no power of two.
template <int P>
__global__ void __launch_bounds__(kCodeThreads) grid_dequantize(Dequantize a) {
  const int64_t row = global_thread() / a.segments;
  const int segment = static_cast<int>(global_thread() - row * a.segments);
  if (row >= a.row_count) return;
  const int p = P > 0 ? P : a.p;
  int k = segment * a.rows.words * a.rows.digits * p;
  uint64_t bits = load_segment(a.rows, start_of(a.rows, a.first_row + row), segment);
  const int64_t to = row * a.in_features, scale_row = (a.first_row + row) * a.blocks;
  int block = a.blocks == 1 ? 0 : k / a.block_size, block_end = a.blocks == 1 ? a.in_features : (block + 1) * a.block_size;
  const Type scale_type = a.half_scales ? Type::f16 : Type::f32;
  float scale = load_float(a.scales, scale_type, scale_row + (block < a.blocks ? block : 0));
  float held[4] = {0, 0, 0, 0};
  TORCHLIN_NO_UNROLL
  for (int w = 0; w < a.rows.words; ++w) {
    uint64_t word = take_word(a.rows, bits);
    TORCHLIN_NO_UNROLL
    for (int d = 0; d < a.rows.digits; ++d) {
      const uint32_t point = next_digit(a.rows, word, d);
      if (k >= block_end && block + 1 < a.blocks) {
        ++block, block_end += a.block_size;
        scale = load_float(a.scales, scale_type, scale_row + block);
      }
      const auto put = [&](int q) {
        const float v = load_constant(a.grid + point * p + q) * scale;
        if (a.vectors) {
          held[0] = held[1], held[1] = held[2], held[2] = held[3], held[3] = v;
          if ((k & 3) == 3 && k < a.in_features) {
            const int64_t at = to + k - 3;
            if (a.type == Type::f32) {
              store_vec(static_cast<float*>(a.out) + at, narrow_vec<float, 4>([&](int i) { return held[i]; }));
            } else if (a.type == Type::f16) {
              store_vec(static_cast<Half*>(a.out) + at, narrow_vec<Half, 4>([&](int i) { return held[i]; }));
            } else {
              store_vec(static_cast<BFloat16*>(a.out) + at, narrow_vec<BFloat16, 4>([&](int i) { return held[i]; }));
            }
          }
        } else if (k < a.in_features) {
          store_float(a.out, a.type, to + k, v);
        }
        ++k;
      };
      if constexpr (P > 0) {
        static_for<P>([&](auto q) { put(q.value); });
      } else {
        TORCHLIN_NO_UNROLL
        for (int q = 0; q < p; ++q) put(q);
      }
    }
  }
}

// ---- pad

struct Pad {
  const float* grid;
  float* out;  // (n, width)
  int n, p, width;
};

// A table that stays in global memory, with its points filled up to a power of two.
static __global__ void __launch_bounds__(kCodeThreads) grid_pad(Pad a) {
  const int64_t i = global_thread();
  const int point = static_cast<int>(i / a.width), q = static_cast<int>(i) - point * a.width;
  if (point < a.n) a.out[i] = q < a.p ? a.grid[point * a.p + q] : 0.0f;
}

}  // namespace torchlin::grid
