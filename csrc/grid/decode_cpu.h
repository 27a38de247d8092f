// Points of codes, and the weights that packed rows stand for.

template <class Code>
inline void decode_codes(const Code* codes, const float* grid, int64_t n, int64_t p, float* points, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t code = codes[i] < n ? codes[i] : n - 1;
    for (int64_t q = 0; q < p; ++q) points[i * p + q] = grid[code * p + q];
  }
}

inline void decode_points(const void* codes, const float* grid, int64_t n, int64_t p, float* points, int64_t begin, int64_t end) {
  if (n <= 256) {
    decode_codes(static_cast<const uint8_t*>(codes), grid, n, p, points, begin, end);
  } else {
    decode_codes(static_cast<const uint16_t*>(codes), grid, n, p, points, begin, end);
  }
}

TORCHLIN_INLINE float scale_at(const grid::Weight& w, int64_t row, int64_t block) {
  const int64_t i = row * w.blocks + block;
  return w.half_scales ? to_float(static_cast<const f16*>(w.scales)[i]) : static_cast<const float*>(w.scales)[i];
}

// Row `row` into `to`, which has room for whole vectors of p; `codes` for those of a row.
inline void dequantize_row(const grid::Weight& w, int64_t row, uint16_t* codes, float* to) {
  unpack_codes(w.packed + row * w.row_bytes, w.row_bytes, w.layout, static_cast<uint32_t>(w.n), 0, w.count, codes);
  decode_codes(codes, w.grid, w.n, w.p, to, 0, w.count);
  for (int64_t b = 0; b < w.blocks; ++b) {
    const float scale = scale_at(w, row, b);
    const int64_t from = b * w.block, until = w.in - from < w.block ? w.in : from + w.block;
    for (int64_t i = from; i < until; ++i) to[i] *= scale;
  }
}

inline void dequantize_rows(const grid::Weight& w, float* weight, int64_t begin, int64_t end) {
  uint16_t* codes = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, w.count);
  float* row = grid::Scratch::get<float>(grid::Purpose::kRow, w.count * w.p);
  for (int64_t r = begin; r < end; ++r) {
    dequantize_row(w, r, codes, row);
    std::memcpy(weight + r * w.in, row, static_cast<size_t>(w.in) * sizeof(float));
  }
}
