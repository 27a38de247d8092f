// Codes out of and into their bit streams, a row at a time.

// Rows are read in 8-byte pieces; those that would end beyond the row are put together from its last bytes.
TORCHLIN_INLINE uint64_t bits_at(const uint8_t* row, int64_t bytes, int64_t bit) {
  const int64_t at = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  uint64_t low = 0;
  if (at + 9 <= bytes) {
    std::memcpy(&low, row + at, 8);
    return shift == 0 ? low : low >> shift | static_cast<uint64_t>(row[at + 8]) << (64 - shift);
  }
  const int64_t rest = bytes - at;
  std::memcpy(&low, row + at, static_cast<size_t>(rest < 8 ? rest : 8));
  low >>= shift;
  if (rest > 8 && shift != 0) low |= static_cast<uint64_t>(row[at + 8]) << (64 - shift);
  return low;
}

// Codes [begin, begin + size) of a row of `count`; begin is the first of a word. What is no code reads as n - 1.
template <class Code>
inline void unpack_codes(const uint8_t* row, int64_t bytes, grid::Layout layout, uint32_t n, int64_t begin, int64_t size,
                         Code* codes) {
  const uint64_t mask = (uint64_t{1} << layout.width) - 1;  // width < 64
  int64_t bit = begin / layout.digits * layout.width;
  if (layout.digits == 1) {
    for (int64_t i = 0; i < size; ++i, bit += layout.width) {
      const uint64_t code = bits_at(row, bytes, bit) & mask;
      codes[i] = static_cast<Code>(code < n ? code : n - 1);
    }
    return;
  }
  for (int64_t i = 0; i < size; i += layout.digits, bit += layout.width) {
    uint64_t word = bits_at(row, bytes, bit) & mask;
    for (int d = 0; d < layout.digits; ++d) {
      const uint64_t rest = word / n, code = d + 1 < layout.digits ? word - rest * n : word;
      if (i + d < size) codes[i + d] = static_cast<Code>(code < n ? code : n - 1);
      word = rest;
    }
  }
}

template <class Code>
inline void pack_codes(const Code* codes, int64_t count, grid::Layout layout, uint32_t n, uint8_t* row, int64_t bytes) {
  unsigned __int128 pending = 0;  // up to 7 + 63 bits
  int filled = 0;
  uint8_t* const end = row + bytes;
  for (int64_t i = 0; i < count; i += layout.digits) {
    uint64_t word = 0;
    for (int d = layout.digits - 1; d >= 0; --d) {
      const uint32_t code = i + d < count ? codes[i + d] : 0;
      word = word * n + (code < n ? code : n - 1);
    }
    pending |= static_cast<unsigned __int128>(word) << filled;
    for (filled += layout.width; filled >= 8; filled -= 8, pending >>= 8) *row++ = static_cast<uint8_t>(pending);
  }
  if (row < end) *row = static_cast<uint8_t>(pending);
}

inline void pack_rows(const void* codes, int64_t count, int64_t n, uint8_t* packed, int64_t begin, int64_t end) {
  const grid::Layout layout = grid::layout_of(n);
  const int64_t bytes = grid::row_bytes_of(layout, count);
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t points = static_cast<uint32_t>(n);
    if (n <= 256) {
      pack_codes(static_cast<const uint8_t*>(codes) + r * count, count, layout, points, packed + r * bytes, bytes);
    } else {
      pack_codes(static_cast<const uint16_t*>(codes) + r * count, count, layout, points, packed + r * bytes, bytes);
    }
  }
}

inline void unpack_rows(const uint8_t* packed, int64_t n, int64_t count, void* codes, int64_t begin, int64_t end) {
  const grid::Layout layout = grid::layout_of(n);
  const int64_t bytes = grid::row_bytes_of(layout, count);
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t points = static_cast<uint32_t>(n);
    if (n <= 256) {
      unpack_codes(packed + r * bytes, bytes, layout, points, 0, count, static_cast<uint8_t*>(codes) + r * count);
    } else {
      unpack_codes(packed + r * bytes, bytes, layout, points, 0, count, static_cast<uint16_t*>(codes) + r * count);
    }
  }
}
