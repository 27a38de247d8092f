// Any grid, one row of x: points come out of a table in cache. Either a gather fills a vector with them, or a point is the memory
// operand of an FMA.

inline constexpr int kLookupRows = 8;        // at a time, each a chain of sums
inline constexpr int64_t kLookupCodes = 128;  // summed on their own: short sums, and memory asked for in small pieces

// A point and its part of x: Step floats of either. Below the step there are zeros in both.
template <int P>
struct PointByPoint {
  static constexpr int kStep = P <= 2 ? P : P <= 4 ? 4 : 8;
  using Sum = typename vector_of<float, kStep>::type;

  template <class Code>
  static TORCHLIN_INLINE void add(const Code* const* codes, int64_t begin, int64_t end, const float* table, const float* x, Sum* sums) {
    for (int64_t c = begin; c < end; ++c) {
      Sum xv;
      std::memcpy(&xv, x + c * kStep, sizeof xv);
      unroll<kLookupRows>([&](int i) __attribute__((always_inline)) {
        Sum point;
        std::memcpy(&point, table + int64_t{codes[i][c]} * kStep, sizeof point);
        sums[i] += point * xv;
      });
    }
  }
};

template <int P>
struct Gathered {
  using Sum = V<float>;

  template <class Code>
  static TORCHLIN_INLINE void add(const Code* const* codes, int64_t begin, int64_t end, const float* table, const float* x, Sum* sums) {
    constexpr int kCodes = kLanes<float> / P;
    int64_t c = begin;
    for (; c + kCodes <= end; c += kCodes) {
      const V<float> xv = load(x + c * P);
      unroll<kLookupRows>([&](int i) __attribute__((always_inline)) { sums[i] += gather_points<P>(table, codes[i] + c) * xv; });
    }
    if (c == end) return;
    const V<float> xv = load_n(x + c * P, (end - c) * P);
    for (int i = 0; i < kLookupRows; ++i) {
      alignas(64) Code last[64] = {};
      std::memcpy(last, codes[i] + c, static_cast<size_t>(end - c) * sizeof(Code));
      sums[i] += gather_points<P>(table, last) * xv;
    }
  }
};

template <int P>
using Lookup = std::conditional_t<(P <= kGathered), Gathered<P <= kGathered ? P : 1>, PointByPoint<P>>;

// Codes [begin, begin + size) of eight rows, block by block.
template <int P, class Code>
TORCHLIN_INLINE void add_rows(const grid::Weight& w, const int64_t* rows, const Code* const* codes, int64_t begin, int64_t size,
                              const float* table, const float* x, typename Lookup<P>::Sum* totals) {
  const int64_t per_block = w.blocks > 1 ? w.block / P : std::max<int64_t>(w.count, 1), step = grid::table_step(P);
  const int64_t ahead = kLookupRows * w.row_bytes, line = 64 * 8 * w.layout.digits / w.layout.width;  // codes of a line
  for (int64_t c = begin, fetched = begin; c < begin + size;) {
    const int64_t b = c / per_block, until = std::min({begin + size, (b + 1) * per_block, c + kLookupCodes});
    for (; fetched < until; fetched += line) {
      for (int i = 0; i < kLookupRows; ++i) {
        __builtin_prefetch(w.packed + rows[i] * w.row_bytes + ahead + fetched / w.layout.digits * w.layout.width / 8);
      }
    }
    typename Lookup<P>::Sum sums[kLookupRows] = {};
    Lookup<P>::add(codes, c - begin, until - begin, table, x + begin * step, sums);
    for (int i = 0; i < kLookupRows; ++i) totals[i] += sums[i] * scale_at(w, rows[i], b);
    c = until;
  }
}

template <int P>
void lookup_gemv(const grid::Linear& job, const float* table, float* y, int64_t begin, int64_t end) {
  using Sum = typename Lookup<P>::Sum;
  const grid::Weight& w = job.weight;
  uint16_t* unpacked = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, (kLookupRows + 2) * kCodesAtATime);
  for (int64_t r = begin; r < end; r += kLookupRows) {
    int64_t rows[kLookupRows];
    Sum totals[kLookupRows] = {};
    for (int i = 0; i < kLookupRows; ++i) rows[i] = std::min(r + i, end - 1);
    for (int64_t c = 0; c < w.count; c += kCodesAtATime) {
      const int64_t size = std::min(kCodesAtATime, w.count - c);
      if (w.n == 256) {
        const uint8_t* codes[kLookupRows];
        for (int i = 0; i < kLookupRows; ++i) codes[i] = w.packed + rows[i] * w.row_bytes + c;
        add_rows<P>(w, rows, codes, c, size, table, job.ready, totals);
      } else {
        const uint16_t* codes[kLookupRows];
        for (int i = 0; i < kLookupRows; ++i) {
          uint16_t* to = unpacked + i * kCodesAtATime;
          codes[i] = i > 0 && rows[i] == rows[i - 1] ? codes[i - 1] : to;
          if (codes[i] != to) continue;
          unpack_codes(w.packed + rows[i] * w.row_bytes, w.row_bytes, w.layout, static_cast<uint32_t>(w.n), c, size, to);
        }
        add_rows<P>(w, rows, codes, c, size, table, job.ready, totals);
      }
    }
    for (int i = 0; i < kLookupRows && r + i < end; ++i) {
      float sum = totals[i][0];
      for (size_t l = 1; l < sizeof(Sum) / sizeof(float); ++l) sum += totals[i][l];
      y[r + i] = sum;
    }
  }
}

using LookupGemv = void (*)(const grid::Linear&, const float*, float*, int64_t, int64_t);
inline constexpr LookupGemv kLookupGemv[] = {&lookup_gemv<1>, &lookup_gemv<2>, &lookup_gemv<3>, &lookup_gemv<4>,
                                             &lookup_gemv<5>, &lookup_gemv<6>, &lookup_gemv<7>, &lookup_gemv<8>};
