// Codes out of and into their bit streams, a row at a time.

// 64 bits of a row from bit `bit` on; what lies beyond the row reads as zero.
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

// Eight codes of Bits bits are Bits bytes: every shift is known.
template <int Bits, class Code>
inline int64_t unpack_eights(const uint8_t* from, int64_t size, int64_t readable, Code* codes) {
  constexpr uint32_t kMask = (1u << Bits) - 1;
  int64_t i = 0;
  for (; i + 8 <= size && i / 8 * Bits + Bits + 4 <= readable; i += 8) {
    const uint8_t* p = from + i / 8 * Bits;
    unroll<8>([&](int j) __attribute__((always_inline)) {
      uint32_t word;
      std::memcpy(&word, p + j * Bits / 8, 4);
      codes[i + j] = static_cast<Code>(word >> (j * Bits % 8) & kMask);
    });
  }
  return i;
}

template <class Code>
inline int64_t unpack_eights_of(int bits, const uint8_t* from, int64_t size, int64_t readable, Code* codes) {
  switch (bits) {
    case 1: return unpack_eights<1>(from, size, readable, codes);
    case 2: return unpack_eights<2>(from, size, readable, codes);
    case 3: return unpack_eights<3>(from, size, readable, codes);
    case 4: return unpack_eights<4>(from, size, readable, codes);
    case 5: return unpack_eights<5>(from, size, readable, codes);
    case 6: return unpack_eights<6>(from, size, readable, codes);
    case 7: return unpack_eights<7>(from, size, readable, codes);
    case 8: return unpack_eights<8>(from, size, readable, codes);
    case 9: return unpack_eights<9>(from, size, readable, codes);
    case 10: return unpack_eights<10>(from, size, readable, codes);
    case 11: return unpack_eights<11>(from, size, readable, codes);
    case 12: return unpack_eights<12>(from, size, readable, codes);
    case 13: return unpack_eights<13>(from, size, readable, codes);
    case 14: return unpack_eights<14>(from, size, readable, codes);
    case 15: return unpack_eights<15>(from, size, readable, codes);
    case 16: return unpack_eights<16>(from, size, readable, codes);
    default: return 0;
  }
}

// Codes [begin, begin + size) of a row; begin is the first of a word. What is no code reads as n - 1.
template <class Code>
inline void unpack_codes(const uint8_t* row, int64_t bytes, grid::Layout layout, uint32_t n, int64_t begin, int64_t size,
                         Code* codes) {
  const uint64_t mask = (uint64_t{1} << layout.width) - 1;  // width < 64
  int64_t bit = begin / layout.digits * layout.width;
  if (layout.digits == 1) {
    int64_t i = 0;
    if ((n & (n - 1)) == 0 && bit % 8 == 0) {
      i = unpack_eights_of(layout.width, row + bit / 8, size, bytes - bit / 8, codes);
      bit += i * layout.width;
    }
    for (; i < size; ++i, bit += layout.width) {
      const uint64_t code = bits_at(row, bytes, bit) & mask;
      codes[i] = static_cast<Code>(code < n ? code : n - 1);
    }
    return;
  }
  // Division by n as a multiplication, at most one too large.
  const uint64_t inverse = ~uint64_t{0} / n + 1;
  for (int64_t i = 0; i < size; i += layout.digits, bit += layout.width) {
    uint64_t word = bits_at(row, bytes, bit) & mask;
    for (int d = 0; d < layout.digits; ++d) {
      uint64_t rest = static_cast<uint64_t>(static_cast<unsigned __int128>(word) * inverse >> 64);
      rest -= rest * n > word;
      const uint64_t code = d + 1 < layout.digits ? word - rest * n : word;
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
