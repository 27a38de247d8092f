// Any grid, one row of x: points come out of a table in cache, and a point times its part of x is one FMA with a memory operand.

inline constexpr int kLookupRows = 8;  // at a time, each a chain of sums

// x as points are: [code][step], missing coordinates zero.
template <int Step, class Code>
TORCHLIN_INLINE void add_points(const Code* const* codes, int64_t begin, int64_t end, const float* table, const float* x,
                                typename vector_of<float, Step>::type* sums) {
  using Point = typename vector_of<float, Step>::type;
  for (int64_t c = begin; c < end; ++c) {
    Point xv;
    std::memcpy(&xv, x + c * Step, sizeof xv);
    unroll<kLookupRows>([&](int i) __attribute__((always_inline)) {
      Point point;
      std::memcpy(&point, table + int64_t{codes[i][c]} * Step, sizeof point);
      sums[i] += point * xv;
    });
  }
}

// Points of one coordinate: a vector of codes at a time.
template <class Code>
TORCHLIN_INLINE void add_scalars(const Code* const* codes, int64_t begin, int64_t end, const float* table, const float* x,
                                 V<float>* sums) {
  constexpr int W = kLanes<float>;
  using Narrow = typename vector_of<Code, W>::type;
  for (int64_t c = begin; c < end; c += W) {
    const V<float> xv = c + W <= end ? load(x + c) : load_n(x + c, end - c);
    unroll<kLookupRows>([&](int i) __attribute__((always_inline)) {
      Narrow narrow = {};
      if (c + W <= end) {
        std::memcpy(&narrow, codes[i] + c, sizeof narrow);
      } else {
        std::memcpy(&narrow, codes[i] + c, static_cast<size_t>(end - c) * sizeof(Code));
      }
      sums[i] += gather(table, __builtin_convertvector(narrow, V<int32_t>)) * xv;
    });
  }
}

// Codes [begin, begin + size) of eight rows: sums[i] += scale of each block * the block's sum.
template <int Step, class Code>
TORCHLIN_INLINE void add_rows(const grid::Weight& w, const int64_t* rows, const Code* const* codes, int64_t begin, int64_t size,
                              const float* table, const float* x, float* totals) {
  using Point = std::conditional_t<Step == 1, V<float>, typename vector_of<float, Step>::type>;
  constexpr int kSize = sizeof(Point) / sizeof(float);
  const int64_t per_block = w.blocks > 1 ? w.block / w.p : w.count;
  for (int64_t c = begin; c < begin + size;) {
    const int64_t b = c / per_block, until = std::min(begin + size, (b + 1) * per_block);
    Point sums[kLookupRows] = {};
    if constexpr (Step == 1) {
      add_scalars(codes, c - begin, until - begin, table, x + begin, sums);
    } else {
      add_points<Step>(codes, c - begin, until - begin, table, x + begin * Step, sums);
    }
    for (int i = 0; i < kLookupRows; ++i) {
      float sum = 0;
      for (int l = 0; l < kSize; ++l) sum += sums[i][l];
      totals[i] += sum * scale_at(w, rows[i], b);
    }
    c = until;
  }
}

template <int Step>
void lookup_gemv(const grid::Linear& job, const float* table, float* y, int64_t begin, int64_t end) {
  const grid::Weight& w = job.weight;
  uint16_t* unpacked = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, kLookupRows * kCodesAtATime);
  for (int64_t r = begin; r < end; r += kLookupRows) {
    int64_t rows[kLookupRows];
    float totals[kLookupRows] = {};
    for (int i = 0; i < kLookupRows; ++i) rows[i] = std::min(r + i, end - 1);
    for (int64_t c = 0; c < w.count; c += kCodesAtATime) {
      const int64_t size = std::min(kCodesAtATime, w.count - c);
      if (w.n == 256) {
        const uint8_t* codes[kLookupRows];
        for (int i = 0; i < kLookupRows; ++i) codes[i] = w.packed + rows[i] * w.row_bytes + c;
        add_rows<Step>(w, rows, codes, c, size, table, job.ready, totals);
      } else {
        const uint16_t* codes[kLookupRows];
        for (int i = 0; i < kLookupRows; ++i) {
          uint16_t* to = unpacked + i * kCodesAtATime;
          codes[i] = to;
          if (i > 0 && rows[i] == rows[i - 1]) {
            codes[i] = codes[i - 1];
            continue;
          }
          unpack_codes(w.packed + rows[i] * w.row_bytes, w.row_bytes, w.layout, static_cast<uint32_t>(w.n), c, size, to);
        }
        add_rows<Step>(w, rows, codes, c, size, table, job.ready, totals);
      }
    }
    for (int i = 0; i < kLookupRows && r + i < end; ++i) y[r + i] = totals[i];
  }
}
