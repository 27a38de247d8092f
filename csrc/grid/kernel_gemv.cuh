// The linear layer for few rows of x: no tensor cores, float32 throughout.
//
// A warp takes four rows of the weight and a step of 32 segments, one a lane. The table is in shared memory with a copy for
// each lane where it fits, x too, as float32; every number of x is used for four rows, every weight for `B` rows of x. Sums
// of lanes, and of warps that share rows, are added in a fixed order.
#pragma once

#include "grid/codes.cuh"

namespace torchlin::grid {

inline constexpr int kGemvThreads = 256, kGemvWarps = kGemvThreads / 32, kGemvRows = 4;
inline constexpr int kGemvBlocks = 2;  // of a multiprocessor, as far as registers go
inline constexpr int kWideCodes = 16;  // of 8 bits: 16 bytes

// Where codes and points come from: 16-byte loads of 8-bit codes and the table in shared memory; words of any width and the
// table in shared memory; the same with a table too large for that.
enum class Source : int { wide, shared, global };

template <Source S>
struct Codes {
  uint64_t bits;
};
template <>
struct Codes<Source::wide> {
  Vec<uint32_t, 4> bits;
};

template <Source S>
__device__ __forceinline__ Codes<S> load_codes(const Rows& rows, const uint8_t* row, int segment) {
  if constexpr (S == Source::wide) {
    return {load_vec<Vec<uint32_t, 4>>(row + segment * 16)};
  } else {
    return {load_segment(rows, row, segment)};
  }
}

// Q numbers, at most 4.
template <int Q>
__device__ __forceinline__ Vec<float, Q> load_global(const float* at) {
  if constexpr (Q == 1) return {{load_constant(at)}};
  else return load_vec<Vec<float, Q>>(at);
}
template <int Q>
__device__ __forceinline__ Vec<float, Q> load_numbers(shared_ptr<float> at) {
  if constexpr (Q == 1) return {{static_cast<float>(*at)}};
  else return load_shared<Vec<float, Q>>(at);
}

// Sums of v[i] over the warp: lane l gets that of i = l / (32 / N). Each exchange halves what is left to add.
template <int N>
__device__ __forceinline__ float reduce(float (&v)[N]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int distance = 16;
  static_for<5>([&](auto level) {
    constexpr int kLeft = N >> level.value;
    if constexpr (kLeft > 1) {
      const bool upper = (lane & distance) != 0;
      static_for<kLeft / 2>([&](auto i) {
        const float keep = upper ? v[i.value + kLeft / 2] : v[i.value], give = upper ? v[i.value] : v[i.value + kLeft / 2];
        v[i.value] = keep + __shfl_xor_sync(0xffffffffu, give, distance);
      });
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
    }
    distance /= 2;
  });
  return v[0];
}

__device__ __forceinline__ Vec<float, 4> load_four(const void* p, Type type, int64_t i) {
  if (type == Type::f32) return load_vec<Vec<float, 4>>(static_cast<const float*>(p) + i);
  const auto words = load_vec<Vec<uint32_t, 2>>(static_cast<const uint16_t*>(p) + i);
  if (type == Type::f16) return {{first_half(words[0]), second_half(words[0]), first_half(words[1]), second_half(words[1])}};
  return {{first_bfloat16(words[0]), second_bfloat16(words[0]), first_bfloat16(words[1]), second_bfloat16(words[1])}};
}

// Puts steps [first, first + count) of B rows of x into shared memory: [step][lookup][B][lane ^ lookup][P]. A thread moves
// four neighbours of a segment at a time.
template <int P, int B>
__device__ __forceinline__ void stage_x(const Linear& a, shared_ptr<float> x, int batch0, int first, int count, int lookups) {
  constexpr int Q = P < 4 ? P : 4;
  const int q = a.table.codes * a.table.p, fours = (lookups * P + 3) / 4, total = count * 32 * fours;
  const bool aligned = q == P && lookups * P % 4 == 0 && a.in_features % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  TORCHLIN_NO_UNROLL
  for (int m = static_cast<int>(threadIdx.x); m < total; m += kGemvThreads) {
    const int segment = m / fours, number = m % fours * 4;  // of these steps; of the segment, with what fills it up
    const int lane = segment % 32, step = segment / 32;
    TORCHLIN_NO_UNROLL
    for (int b = 0; b < B; ++b) {
      const bool exists = batch0 + b < a.batch;
      const int64_t row = static_cast<int64_t>(batch0 + (exists ? b : 0)) * a.in_features;
      Vec<float, 4> v = {{0, 0, 0, 0}};
      if (aligned) {
        const int k = (first * 32 + segment) * lookups * P + number;
        if (exists && k < a.in_features) v = load_four(a.x, a.type, row + k);
      } else {
        static_for<4>([&](auto i) {
          const int lookup = (number + i.value) / P, coordinate = (number + i.value) % P;
          const int k = ((first * 32 + segment) * lookups + lookup) * q + coordinate;
          const bool there = exists && lookup < lookups && coordinate < q && k < a.in_features;
          if (there) v[i.value] = load_float(a.x, a.type, row + k);
        });
      }
      static_for<4 / Q>([&](auto l) {
        const int lookup = number / P + l.value;
        Vec<float, Q> part;
        static_for<Q>([&](auto i) { part[i.value] = v[l.value * Q + i.value]; });
        if (lookup < lookups)
          store_shared(x + (((step * lookups + lookup) * B + b) * 32 + (lane ^ (lookup & 31))) * P + number % P, part);
      });
    }
  }
}

// Two blocks leave a thread 128 registers, too few for wide words of long points or of many rows of x: those would spill.
template <int P, int B, Source S>
inline constexpr int kGemvBlocksOf = S == Source::wide && (P == 4 || P * B >= 16) ? 1 : kGemvBlocks;

template <int P, int B, Source S>
__global__ void __launch_bounds__(kGemvThreads, (kGemvBlocksOf<P, B, S>)) grid_gemv(Linear a) {
  constexpr int R = kGemvRows, N = R * B;
  constexpr bool kAhead = B == 1;  // codes are loaded a step early; else there is work enough to wait behind, and no registers
  const int lookups = S == Source::wide ? kWideCodes : a.rows.words * a.rows.digits;
  const int log_stride = S == Source::wide ? 5 : a.table.log_stride;
  const shared_ptr<float> table = dynamic_shared<float>();
  const shared_ptr<float> x = table + (S == Source::global ? 0 : a.table.entries << log_stride);
  const shared_ptr<float> sums = x + B * a.chunk * lookups * 32 * P;  // [warp][R][B], where warps share rows
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int split = warp % a.splits, slot = warp / a.splits, slots = kGemvWarps / a.splits;
  const int batch0 = static_cast<int>(blockIdx.y) * B, groups = (a.out_features + R - 1) / R;
  const shared_ptr<float> own = table + lane % ((1 << log_stride) / P) * P;  // this lane's copy of entry 0
  const int weights = lookups * a.table.codes * a.table.p;                     // of a segment

  // Groups of rows are dealt to blocks in turn, so that multiprocessors get as many, give or take one.
  TORCHLIN_NO_UNROLL
  for (int first = static_cast<int>(blockIdx.x); first < groups; first += static_cast<int>(gridDim.x) * slots) {
    const int row0 = (first + slot * static_cast<int>(gridDim.x)) * R;
    // The last group begins early enough to be whole, and all but its own rows are dropped at the end.
    const int base = smaller_of(row0, a.out_features > R ? a.out_features - R : 0);
    const bool works = row0 < a.out_features;  // else the warp only keeps the others company
    const auto row_of_group = [&](int r) { return smaller_of(r, a.out_features - 1); };
    const uint8_t* const start = start_of(a.rows, base);
    float sum[R][B] = {}, scale[R] = {};
    const auto set_scales = [&](int k) {
      const int block = a.blocks == 1 ? 0 : smaller_of(k / a.block_size, a.blocks - 1);
      static_for<R>([&](auto r) { scale[r.value] = load_scale(a, base + row_of_group(r.value), block); });
    };
    if (a.blocks == 1 && a.steps > 0) set_scales(0);
    const auto segment_of = [&](int step) { return smaller_of(step * 32 + lane, a.segments - 1); };
    Codes<S> next[R] = {};
    const auto load = [&](int step) {
      static_for<R>([&](auto r) { next[r.value] = load_codes<S>(a.rows, start + row_of_group(r.value) * a.rows.row_bytes, segment_of(step)); });
    };
    if (kAhead && works && split < a.steps) load(split);
    if (first == static_cast<int>(blockIdx.x) && S != Source::global) {
      fill_table<P, P>(a.table, shared_cast<uint32_t>(table), kGemvThreads, [](const float(&v)[P]) {
        Vec<uint32_t, P> words;
        static_for<P>([&](auto i) { words[i.value] = bits_as<uint32_t>(v[i.value]); });
        return words;
      });
    }
    TORCHLIN_NO_UNROLL
    for (int chunk0 = 0; chunk0 < a.steps; chunk0 += a.chunk) {
      const int end = smaller_of(chunk0 + a.chunk, a.steps);
      if (a.steps > a.chunk || first == static_cast<int>(blockIdx.x)) {
        __syncthreads();
        stage_x<P, B>(a, x, batch0, chunk0, end - chunk0, lookups);
        __syncthreads();
      }
      TORCHLIN_NO_UNROLL
      for (int step = chunk0 + split; works && step < end; step += a.splits) {
        Codes<S> codes[R];
        if (!kAhead) load(step);
        static_for<R>([&](auto r) { codes[r.value] = next[r.value]; });
        // The next step of this chunk, or this warp's first of the next one.
        const int following = step + a.splits < end ? step + a.splits : end + split;
        if (kAhead && following < a.steps) load(following);
        const int k0 = segment_of(step) * weights;
        if (a.blocks > 1 && (S == Source::wide || !a.fine)) set_scales(k0);
        const shared_ptr<float> x_step = x + (step - chunk0) * lookups * B * 32 * P;
        // One lookup in each of the rows, times x; at most four coordinates at a time.
        const auto multiply = [&](int lookup, const uint32_t(&entry)[R]) {
          if (S != Source::wide && a.fine) set_scales(k0 + lookup * a.table.codes * a.table.p);
          const shared_ptr<float> at = x_step + lookup * B * 32 * P + (lane ^ (lookup & 31)) * P;
          constexpr int Q = P < 4 ? P : 4;
          TORCHLIN_NO_UNROLL
          for (int offset = 0; offset < P; offset += Q) {
            Vec<float, Q> point[R];
            static_for<R>([&](auto r) {
              const uint32_t e = entry[r.value];
              if constexpr (S == Source::global) {
                point[r.value] = load_global<Q>(a.table.grid + static_cast<int64_t>(e) * P + offset);
              } else {
                point[r.value] = load_numbers<Q>(own + static_cast<int>(e << log_stride) + offset);
              }
            });
            if constexpr (B == 1) {
              const auto v = load_numbers<Q>(at + offset);
              static_for<R>([&](auto r) {
                float product = point[r.value][0] * v[0];
                static_for<Q - 1>([&](auto i) { product = fused(point[r.value][i.value + 1], v[i.value + 1], product); });
                sum[r.value][0] = fused(product, scale[r.value], sum[r.value][0]);
              });
            } else {
              static_for<R>([&](auto r) { static_for<Q>([&](auto i) { point[r.value][i.value] *= scale[r.value]; }); });
              static_for<B>([&](auto b) {
                const auto v = load_numbers<Q>(at + b.value * 32 * P + offset);
                static_for<R>([&](auto r) {
                  static_for<Q>([&](auto i) {
                    sum[r.value][b.value] = fused(point[r.value][i.value], v[i.value], sum[r.value][b.value]);
                  });
                });
              });
            }
          }
        };
        uint32_t entry[R];
        if constexpr (S == Source::wide) {
          // Not all at once: the compiler would load ahead until registers run out.
          constexpr int kAtOnce = B == 1 ? 8 : B == 4 ? 4 : 2;
          TORCHLIN_NO_UNROLL
          for (int j0 = 0; j0 < kWideCodes; j0 += kAtOnce) {
            static_for<kAtOnce>([&](auto j) {
              static_for<R>([&](auto r) {
                entry[r.value] = codes[r.value].bits[j.value / 4] >> 8 * (j.value % 4) & 0xff;
              });
              multiply(j0 + j.value, entry);
            });
            static_for<R>([&](auto r) {
              auto& bits = codes[r.value].bits;
              constexpr int kWords = kAtOnce / 4;
              if constexpr (kWords > 0) {
                static_for<4 - kWords>([&](auto i) { bits[i.value] = bits[i.value + kWords]; });
              } else {
                static_for<4>([&](auto i) {
                  bits[i.value] = funnel_right(bits[i.value], i.value < 3 ? bits[(i.value + 1) % 4] : 0, 8 * kAtOnce);
                });
              }
            });
          }
        } else if (a.rows.digits == 1) {
          TORCHLIN_NO_UNROLL
          for (int w = 0; w < a.rows.words; ++w) {
            static_for<R>([&](auto r) {
              entry[r.value] = static_cast<uint32_t>(take_word(a.rows, codes[r.value].bits));
              if (S == Source::global && entry[r.value] >= a.rows.radix.n) entry[r.value] = a.rows.radix.n - 1;
            });
            multiply(w, entry);
          }
        } else {
          TORCHLIN_NO_UNROLL
          for (int w = 0; w < a.rows.words; ++w) {
            uint64_t word[R];
            static_for<R>([&](auto r) { word[r.value] = take_word(a.rows, codes[r.value].bits); });
            TORCHLIN_NO_UNROLL
            for (int d = 0; d < a.rows.digits; ++d) {
              static_for<R>([&](auto r) { entry[r.value] = next_digit(a.rows, word[r.value], d); });
              multiply(w * a.rows.digits + d, entry);
            }
          }
        }
      }
    }

    float v[N];
    static_for<N>([&](auto i) { v[i.value] = sum[i.value / B][i.value % B]; });
    const float reduced = reduce(v);
    const int i = lane / (32 / N);
    const auto store = [&](int own_row0, int at, float s) {
      const int row = smaller_of(own_row0, a.out_features > R ? a.out_features - R : 0) + at / B, b = batch0 + at % B;
      if (row >= own_row0 && row < a.out_features && b < a.batch) store_sum(a, b, row, s);
    };
    if (a.splits == 1) {
      if (lane % (32 / N) == 0) store(row0, i, reduced);
    } else {
      if (lane % (32 / N) == 0) sums[warp * N + i] = reduced;
      __syncthreads();
      const int t = static_cast<int>(threadIdx.x);
      if (t < slots * N) {
        float s = 0;
        for (int part_of = 0; part_of < a.splits; ++part_of) s += sums[(t / N * a.splits + part_of) * N + t % N];
        store((first + t / N * static_cast<int>(gridDim.x)) * R, t % N, s);
      }
      __syncthreads();
    }
  }
}

}  // namespace torchlin::grid
