// The linear layer for 16-bit x, on tensor cores: even for one row, where they save the lookups half of their bytes.
//
// Points are looked up as pairs of 16-bit numbers, and a pair is a register of the instruction's first operand as it comes:
// the decoded weight is never in memory. Which numbers of a row the instruction takes to be its 16 is free, as long as x
// agrees: lane t of four takes a segment of codes, and four of its weights an instruction. Scales are applied in float32 to
// sums of their block, so that 16-bit types round the points of the grid only (and x is 16-bit already).
#pragma once

#include "gpu/mma.cuh"
#include "grid/codes.cuh"
#include "grid/kernel_gemv.cuh"

namespace torchlin::grid {

inline constexpr int kMmaThreads = 512, kMmaWarps = kMmaThreads / 32;

// A warp works on M tiles of 16 rows with 8 N rows of x: a number of x that is read serves all of the former, a point that
// is looked up all of the latter. Only narrow and blocks have registers left for sums of a block beside those of a row.
enum class Tiling : int { narrow, tall, broad, blocks };
template <Tiling T>
inline constexpr int kMmaTiles = T == Tiling::tall ? 2 : 1;
template <Tiling T>
inline constexpr int kMmaColumns = T == Tiling::narrow ? 8 : T == Tiling::broad ? 64 : 32;

// Words of a row of x in shared memory, [step][piece of four numbers][lane of four]; an odd number of pieces of all lanes, so
// that four rows by four lanes reach all banks.
inline __host__ __device__ int staged_row(int steps, int pieces) { return (steps * pieces | 1) * 8; }

// Floats of the sums of a warp.
inline __host__ __device__ int sums_of_warp(int columns, int rows) { return columns * (rows + 4); }

// Segment of lane t in a step. Steps do not reach over blocks of scales: those at the end of a block may be short.
struct Place {
  int segment;
  bool exists;
};
__device__ __forceinline__ Place place_of(const Linear& a, bool one_block, int step, int lane, int segments_of_block,
                                          int steps_of_block) {
  const int block = one_block ? 0 : step / steps_of_block;
  const int in_block = (step - block * steps_of_block) * 4 + lane, segment = block * segments_of_block + in_block;
  const bool exists = in_block < segments_of_block && segment < a.segments;
  return {exists ? segment : 0, exists};
}

__device__ __forceinline__ uint32_t pack_pair(bool bf16, float first, float second) {
  return bf16 ? pack_bfloat16(first, second) : pack_half(first, second);
}

// The register for weights 2h, 2h + 1 of a piece of four.
template <int P>
__device__ __forceinline__ void look_up(shared_ptr<uint32_t> own, int log_stride, const uint32_t* entry, uint32_t (&pair)[2]) {
  if constexpr (P == 1) {  // entries hold their number twice
    uint32_t v[4];
    static_for<4>([&](auto i) { v[i.value] = own[static_cast<int>(entry[i.value] << log_stride)]; });
    pair[0] = byte_permute(v[0], v[1], 0x5410), pair[1] = byte_permute(v[2], v[3], 0x5410);
  } else if constexpr (P == 2) {
    static_for<2>([&](auto i) { pair[i.value] = own[static_cast<int>(entry[i.value] << log_stride)]; });
  } else {
    const auto both = load_shared<Vec<uint32_t, 2>>(own + static_cast<int>(entry[0] << log_stride));
    pair[0] = both[0], pair[1] = both[1];
  }
}

template <int P, Tiling T, bool Wide>
__global__ void __launch_bounds__(kMmaThreads, 1) grid_mma(Linear a) {
  constexpr int M = kMmaTiles<T>, N = kMmaColumns<T> / 8, kRows = 16 * M, kColumns = 8 * N, kWords = P == 4 ? 2 : 1;
  constexpr int kLookups = 4 / P;                        // in a piece
  constexpr Source S = Wide ? Source::wide : Source::shared;
  const int lookups = Wide ? kWideCodes : a.rows.words * a.rows.digits;
  const int pieces = (lookups + kLookups - 1) / kLookups;
  const int log_stride = Wide ? 5 : a.table.log_stride;
  const int q = a.table.codes * a.table.p, weights = lookups * q;
  const shared_ptr<uint32_t> table = dynamic_shared<uint32_t>();
  const shared_ptr<uint32_t> x = table + (a.table.entries << log_stride);  // pairs; after the last step, sums
  const int pitch = staged_row(a.chunk, pieces), sums_pitch = sums_of_warp(kColumns, kRows);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int split = warp % a.splits, slot = warp / a.splits, slots = kMmaWarps / a.splits;
  const int part_of = static_cast<int>(blockIdx.y) % a.parts, steps_of_part = (a.steps + a.parts - 1) / a.parts;
  const int begin = part_of * steps_of_part, limit = smaller_of(begin + steps_of_part, a.steps);
  const int batch0 = static_cast<int>(blockIdx.y) / a.parts * kColumns, groups = (a.out_features + kRows - 1) / kRows;
  const bool bf16 = a.type == Type::bf16;
  const shared_ptr<uint32_t> own = table + lane % ((1 << log_stride) / kWords) * kWords;
  const bool one_block = T == Tiling::tall || T == Tiling::broad || a.blocks == 1;
  // Columns that are not there repeat one that is, or are zero: they make sums that nobody stores.
  const int columns = N == 1 ? smaller_of(a.batch - batch0, kColumns) : kColumns;
  const int segments_of_block = one_block ? a.segments : a.block_size / weights;
  const int steps_of_block = one_block ? a.steps : (segments_of_block + 3) / 4;
  const bool aligned = q == P && a.in_features % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 8 == 0;

  // x of steps [first, first + count), a piece a thread.
  const auto stage = [&](int first, int count) {
    const int total = columns * count * 4 * pieces;
    TORCHLIN_NO_UNROLL
    for (int m = static_cast<int>(threadIdx.x); m < total; m += kMmaThreads) {
      const int piece = m % pieces, at_lane = m / pieces % 4, rest = m / (4 * pieces), step = rest % count, b = rest / count;
      const Place place = place_of(a, one_block, first + step, at_lane, segments_of_block, steps_of_block);
      const int lookup = piece * kLookups, k = (place.segment * lookups + lookup) * q;
      const bool exists = place.exists && batch0 + b < a.batch;
      const uint16_t* const from =
          static_cast<const uint16_t*>(a.x) + static_cast<int64_t>(batch0 + (exists ? b : 0)) * a.in_features;
      Vec<uint32_t, 2> words = {{0, 0}};
      if (aligned && lookups % kLookups == 0) {
        if (exists && k < a.in_features) words = load_vec<Vec<uint32_t, 2>>(from + k);
      } else {
        static_for<4>([&](auto i) {
          const int number = i.value / P * q + i.value % P;
          const bool there = exists && i.value % P < q && lookup + i.value / P < lookups && k + number < a.in_features;
          if (there) words[i.value / 2] |= static_cast<uint32_t>(from[k + number]) << 16 * (i.value % 2);
        });
      }
      store_shared(x + b * pitch + ((step * pieces + piece) * 4 + at_lane) * 2, words);
    }
  };

  TORCHLIN_NO_UNROLL
  for (int first = static_cast<int>(blockIdx.x); first < groups; first += static_cast<int>(gridDim.x) * slots) {
    const int row0 = (first + slot * static_cast<int>(gridDim.x)) * kRows;
    int row[2 * M];  // 8 i + g of the warp's
    static_for<2 * M>([&](auto i) { row[i.value] = smaller_of(row0 + 8 * i.value + g, a.out_features - 1); });
    float total[M][N][4] = {}, part[M][N][4] = {};
    Codes<S> next[2 * M] = {};
    const auto load = [&](int step) {
      const int segment = place_of(a, one_block, step, t, segments_of_block, steps_of_block).segment;
      static_for<2 * M>([&](auto i) { next[i.value] = load_codes<S>(a.rows, start_of(a.rows, row[i.value]), segment); });
    };
    const bool works = row0 < a.out_features;  // else the warp only keeps the others company
    if (works && begin + split < limit) load(begin + split);
    if (first == static_cast<int>(blockIdx.x)) {
      fill_table<P, kWords>(a.table, table, kMmaThreads, [&](const float(&v)[P]) {
        Vec<uint32_t, kWords> words;
        static_for<kWords>(
            [&](auto i) { words[i.value] = pack_pair(bf16, v[P == 1 ? 0 : 2 * i.value], v[P == 1 ? 0 : 2 * i.value + 1]); });
        return words;
      });
    }
    TORCHLIN_NO_UNROLL
    for (int chunk0 = begin; chunk0 < limit; chunk0 += a.chunk) {
      const int end = smaller_of(chunk0 + a.chunk, limit);
      __syncthreads();
      stage(chunk0, end - chunk0);
      __syncthreads();
      TORCHLIN_NO_UNROLL
      for (int step = chunk0 + split; works && step < end; step += a.splits) {
        Codes<S> codes[2 * M];
        static_for<2 * M>([&](auto i) { codes[i.value] = next[i.value]; });
        const int following = step + a.splits < end ? step + a.splits : end + split;
        if (following < limit) load(following);
        const shared_ptr<uint32_t> x_step = x + smaller_of(g, columns - 1) * pitch + ((step - chunk0) * pieces * 4 + t) * 2;
        // One instruction for each tile and eight rows of x, with the entries of a piece in each of the lane's rows.
        const auto multiply = [&](int piece, const uint32_t(&entry)[2 * M][kLookups]) {
          uint32_t weight[M][4];
          static_for<2 * M>([&](auto i) {
            uint32_t pair[2];
            look_up<P>(own, log_stride, entry[i.value], pair);
            weight[i.value / 2][i.value % 2] = pair[0], weight[i.value / 2][i.value % 2 + 2] = pair[1];
          });
          const auto for_type = [&](auto type) {
            static_for<N>([&](auto n) {
              const auto v = load_shared<Vec<uint32_t, 2>>(x_step + n.value * 8 * pitch + piece * 8);
              const uint32_t numbers[2] = {v[0], v[1]};
              static_for<M>([&](auto m) { mma_m16n8k16<decltype(type)>(part[m.value][n.value], weight[m.value], numbers); });
            });
          };
          if (bf16) for_type(BFloat16{});
          else for_type(Half{});
        };
        uint32_t entry[2 * M][kLookups];
        if constexpr (Wide) {
          static_for<kWideCodes / kLookups>([&](auto piece) {
            static_for<2 * M * kLookups>([&](auto e) {
              constexpr int i = e.value / kLookups, l = e.value % kLookups, j = piece.value * kLookups + l;
              entry[i][l] = codes[i].bits[j / 4] >> 8 * (j % 4) & 0xff;
            });
            multiply(piece.value, entry);
          });
        } else {
          uint64_t word[2 * M] = {};
          int digit = 0, taken = 0;
          TORCHLIN_NO_UNROLL
          for (int piece = 0; piece < pieces; ++piece) {
            static_for<kLookups>([&](auto l) {
              if (a.rows.digits == 1) {
                static_for<2 * M>([&](auto i) {
                  entry[i.value][l.value] = static_cast<uint32_t>(take_word(a.rows, codes[i.value].bits));
                });
              } else {
                const bool there = taken < lookups;  // else x is zero
                static_for<2 * M>([&](auto i) {
                  if (digit == 0) word[i.value] = take_word(a.rows, codes[i.value].bits);
                  entry[i.value][l.value] = there ? next_digit(a.rows, word[i.value], digit) : 0;
                });
                ++taken;
                digit = digit + 1 == a.rows.digits ? 0 : digit + 1;
              }
            });
            multiply(piece, entry);
          }
        }
        if (!one_block) {
          const int block = step / steps_of_block;
          static_for<2 * M>([&](auto i) {
            const float scale = load_scale(a, row[i.value], block);
            static_for<2 * N>([&](auto c) {
              constexpr int m = i.value / 2, n = c.value / 2, d = i.value % 2 * 2 + c.value % 2;
              total[m][n][d] = fused(part[m][n][d], scale, total[m][n][d]);
              part[m][n][d] = 0;
            });
          });
        }
      }
    }
    // Sums of the warps that share rows, in order.
    __syncthreads();
    const shared_ptr<float> sums = shared_cast<float>(x);  // [warp][column][row]
    static_for<M * N * 4>([&](auto e) {
      constexpr int m = e.value / (4 * N), n = e.value / 4 % N, d = e.value % 4;
      const int column = 8 * n + 2 * t + d % 2, r = 16 * m + g + d / 2 * 8;
      const float sum = one_block ? part[m][n][d] : total[m][n][d];
      sums[warp * sums_pitch + column * (kRows + 4) + r] = sum;
    });
    __syncthreads();
    TORCHLIN_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < slots * kColumns * kRows; i += kMmaThreads) {
      const int r = i % kRows, column = i / kRows % kColumns, at_slot = i / kRows / kColumns;
      const int at_row = (first + at_slot * static_cast<int>(gridDim.x)) * kRows + r;
      float s = 0;
      for (int w = 0; w < a.splits; ++w) s += sums[(at_slot * a.splits + w) * sums_pitch + column * (kRows + 4) + r];
      const int b = batch0 + column;
      if (at_row >= a.out_features || b >= a.batch) continue;
      if (one_block) s *= load_scale(a, at_row, 0);
      if (a.parts == 1) store_sum(a, b, at_row, s);
      else a.partial[(static_cast<int64_t>(part_of) * a.batch + b) * a.out_features + at_row] = s;
    }
  }
}

// Adds the parts, in order.
static __global__ void __launch_bounds__(kMmaThreads) grid_add(Linear a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMmaThreads + threadIdx.x;
  const int64_t count = static_cast<int64_t>(a.batch) * a.out_features;
  if (i >= count) return;
  float sum = 0;
  for (int part = 0; part < a.parts; ++part) sum += a.partial[part * count + i];
  store_sum(a, static_cast<int>(i / a.out_features), static_cast<int>(i % a.out_features), sum);
}

}  // namespace torchlin::grid
