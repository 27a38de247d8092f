// Packed codes and tables of grid points, as all kernels of this family read them.
//
// A row of codes is a little-endian stream of words of `width` bits. A thread reads a segment of it at a time: a few
// words, 64 bits at most. A word is an index into a table, or it holds several indices as the digits of a number to
// the base n. Tables have 1, 2, 4 or 8 coordinates an entry, filled up with zeros; where codes are short an entry is
// several points side by side (two 4-bit codes are one index into 256 pairs), so that a lookup gives more weights.
#pragma once

#include "gpu/math.cuh"
#include "gpu/scalar.cuh"

namespace torchlin::grid {

using namespace torchlin::gpu;

enum class Type : int { f32, f16, bf16 };

__device__ __forceinline__ float load_float(const void* p, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(p)[i];
  if (type == Type::f16) return widen(static_cast<const Half*>(p)[i]);
  return widen(static_cast<const BFloat16*>(p)[i]);
}

__device__ __forceinline__ void store_float(void* p, Type type, int64_t i, float v) {
  if (type == Type::f32) static_cast<float*>(p)[i] = v;
  else if (type == Type::f16) static_cast<Half*>(p)[i] = narrow<Half>(v);
  else static_cast<BFloat16*>(p)[i] = narrow<BFloat16>(v);
}

// Codes are uint8 up to n = 256, else uint16.
__device__ __forceinline__ uint32_t load_code(const void* p, bool wide, int64_t i) {
  return wide ? static_cast<const uint16_t*>(p)[i] : static_cast<const uint8_t*>(p)[i];
}
__device__ __forceinline__ void store_code(void* p, bool wide, int64_t i, uint32_t code) {
  if (wide) static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(code);
  else static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(code);
}

// ---- words and digits

#if defined(__CUDACC__)
__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t count) {
  return __funnelshift_r(low, high, count);
}
#else
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t count) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (count & 31));
}
#endif

// Division by n as a multiplication.
struct Radix {
  uint32_t n, magic;
  uint64_t wide_magic;

  Radix() = default;
  explicit Radix(uint32_t base)
      : n(base), magic(static_cast<uint32_t>((uint64_t{1} << 32) / base + 1)), wide_magic(~uint64_t{0} / base + 1) {}
};

// v % n; v becomes v / n. The multiplication may be one too high.
__device__ __forceinline__ uint32_t take_digit(const Radix& r, uint32_t& v) {
  uint32_t q = gpu::multiply_high(v, r.magic);
  uint32_t rest = v - q * r.n;
  if (static_cast<int32_t>(rest) < 0) rest += r.n, --q;
  v = q;
  return rest;
}
__device__ __forceinline__ uint32_t take_digit(const Radix& r, uint64_t& v) {
  uint64_t q = multiply_high(v, r.wide_magic);
  uint64_t rest = v - q * r.n;
  if (static_cast<int64_t>(rest) < 0) rest += r.n, --q;
  v = q;
  return static_cast<uint32_t>(rest);
}

struct Rows {
  const uint8_t* data;
  int64_t row_bytes;
  int width;   // bits of a word, at most 63
  int digits;  // indices in a word
  int words;   // in a segment
  Radix radix; // of the digits
};

__device__ __forceinline__ uint64_t low_bits(int count) { return (uint64_t{1} << count) - 1; }

__device__ __forceinline__ const uint8_t* start_of(const Rows& rows, int64_t row) { return rows.data + row * rows.row_bytes; }

// The words of a segment of the row at `row`. Reads aligned words of 32 bits that hold a byte of this row; bits beyond the row are not its own.
__device__ __forceinline__ uint64_t load_segment(const Rows& rows, const uint8_t* row, int segment) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(row);
  const int ahead = static_cast<int>(start & 3), last = (ahead + static_cast<int>(rows.row_bytes) - 1) >> 2;
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(start - ahead);
  const uint32_t bit = static_cast<uint32_t>(8 * ahead) + static_cast<uint32_t>(segment) * (rows.words * rows.width);
  const int at = static_cast<int>(bit >> 5);
  const auto word = [&](int i) { return words[i < last ? i : last]; };
  const uint32_t a = word(at), b = word(at + 1), c = word(at + 2);
  return uint64_t{funnel_right(b, c, bit)} << 32 | funnel_right(a, b, bit);
}

// The next word of a segment.
__device__ __forceinline__ uint64_t take_word(const Rows& rows, uint64_t& segment) {
  const uint64_t word = segment & low_bits(rows.width);
  segment >>= rows.width;
  return word;
}

// Digit `d` of a word, which loses it. What is no digit, in the last place, reads as n - 1.
__device__ __forceinline__ uint32_t next_digit(const Rows& rows, uint64_t& word, int d) {
  if (d + 1 == rows.digits) return word < rows.radix.n ? static_cast<uint32_t>(word) : rows.radix.n - 1;
  if (rows.width > 32) return take_digit(rows.radix, word);
  uint32_t narrow_word = static_cast<uint32_t>(word);
  const uint32_t digit = take_digit(rows.radix, narrow_word);
  word = narrow_word;
  return digit;
}

// ---- tables

struct Table {
  const float* grid;
  int n, p;
  int codes;       // points in an entry, at most 4; codes * p <= coordinates
  Radix radix;     // the entry is a number of that many digits to this base
  int entries;
  int log_stride;  // of an entry in shared memory, in words; the entry is repeated to fill it
};

// f(i, value) for the P coordinates of an entry, in order.
template <int P, class F>
__device__ __forceinline__ void each_coordinate(const Table& t, uint32_t entry, F&& f) {
  uint32_t left = entry;
  int q = t.p, c = -1;
  uint32_t point = 0;
  static_for<P>([&](auto i) {
    if (q == t.p) {
      q = 0;
      if (++c + 1 < t.codes) point = take_digit(t.radix, left);
      else point = left;
      if (point >= static_cast<uint32_t>(t.n)) point = static_cast<uint32_t>(t.n) - 1;
    }
    f(i, c < t.codes ? load_constant(t.grid + point * t.p + q) : 0.0f);
    ++q;
  });
}

// Lanes read entries at random: with a copy for each lane (stride 32) no two of them meet in a bank. `Words` 32-bit
// words an entry, made by convert(coordinates). An entry's copies begin with the one whose bank is this thread's own.
template <int P, int Words, class F>
__device__ __forceinline__ void fill_table(const Table& t, shared_ptr<uint32_t> table, int threads, F&& convert) {
  const int copies = (1 << t.log_stride) / Words;
  TORCHLIN_NO_UNROLL
  for (int entry = static_cast<int>(threadIdx.x); entry < t.entries; entry += threads) {
    float v[P];
    each_coordinate<P>(t, static_cast<uint32_t>(entry), [&](auto i, float value) { v[i.value] = value; });
    const Vec<uint32_t, Words> words = convert(v);
    TORCHLIN_NO_UNROLL
    for (int i = 0; i < copies; ++i) {
      const int copy = (i + entry) & (copies - 1);
      const shared_ptr<uint32_t> at = table + (entry << t.log_stride) + copy * Words;
      constexpr int kStep = Words < 4 ? Words : 4;
      static_for<Words / kStep>([&](auto s) {
        Vec<uint32_t, kStep> part;
        static_for<kStep>([&](auto k) { part[k.value] = words[s.value * kStep + k.value]; });
        store_shared(at + s.value * kStep, part);
      });
    }
  }
}

// ---- the linear layer

// y = x W'^T + bias, as both kernels of it are told. x is put into shared memory segment by segment, its vectors filled
// up with zeros like the table's; what is beyond the row is zero there, so that no lookup has to be left out.
struct Linear {
  Rows rows;
  Table table;
  const void *x, *scales, *bias;
  void* y;
  Type type;         // of x, bias and y
  bool half_scales;  // else float
  bool fine;         // blocks end within segments
  int batch, in_features, out_features;
  int blocks, block_size;  // of scales in a row
  int segments;            // of a row
  int steps;               // of a row: a segment for every lane, or for every lane of four
  int chunk;               // steps of which x is in shared memory at a time
  int splits;              // warps that share rows, and divide the steps of a chunk
  int parts;               // blocks that share rows, and divide the steps; more than one leave sums in `partial`
  float* partial;          // (parts, batch, out_features)
};

__device__ __forceinline__ float load_scale(const Linear& a, int row, int block) {
  const int64_t i = static_cast<int64_t>(row) * a.blocks + block;
  return load_float(a.scales, a.half_scales ? Type::f16 : Type::f32, i);
}

__device__ __forceinline__ int smaller_of(int a, int b) { return a < b ? a : b; }

// The one rounding.
__device__ __forceinline__ void store_sum(const Linear& a, int b, int row, float sum) {
  if (a.bias != nullptr) sum += load_float(a.bias, a.type, row);
  store_float(a.y, a.type, static_cast<int64_t>(b) * a.out_features + row, sum);
}

}  // namespace torchlin::grid
