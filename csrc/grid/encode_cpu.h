// The nearest grid point of every vector of p neighbours in a row, the last of which may be ragged.

template <class Code>
inline void encode_rows_of(const grid::NearestIndex& index, const float* x, int64_t k, Code* codes, int64_t begin, int64_t end) {
  const int64_t p = index.p, whole = k / p, ragged = k % p, count = whole + (ragged != 0);
  if (ragged == 0) return nearest(index, x + begin * k, (end - begin) * whole, p, codes + begin * count);
  for (int64_t r = begin; r < end; ++r) {
    nearest(index, x + r * k, whole, p, codes + r * count);
    nearest(index, x + r * k + whole * p, 1, ragged, codes + r * count + whole);
  }
}

inline void encode_rows(const grid::NearestIndex& index, const float* x, int64_t k, void* codes, int64_t begin, int64_t end) {
  if (index.n <= 256) {
    encode_rows_of(index, x, k, static_cast<uint8_t*>(codes), begin, end);
  } else {
    encode_rows_of(index, x, k, static_cast<uint16_t*>(codes), begin, end);
  }
}
