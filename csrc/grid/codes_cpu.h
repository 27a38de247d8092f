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

// Eight codes of Bits bits are Bits bytes: every place and shift is known.
template <int Bits, class Code>
inline int64_t unpack_eights(const uint8_t* from, int64_t size, int64_t readable, Code* codes) {
  constexpr uint32_t kMask = (1u << Bits) - 1;
  int64_t i = 0;
#if TORCHLIN_ISA_BYTES >= 32
  if constexpr (sizeof(Code) == 2) {
    alignas(32) int8_t places[32];
    alignas(32) int32_t shifts[8];
    for (int j = 0; j < 8; ++j) {
      shifts[j] = j * Bits % 8;
      for (int byte = 0; byte < 4; ++byte) {
        const int at = j * Bits / 8 + byte;
        places[j * 4 + byte] = static_cast<int8_t>(at < 16 ? at : -1);
      }
    }
    const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
    const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(kMask));
    for (; i + 8 <= size && i / 8 * Bits + 16 <= readable; i += 8) {
      const __m256i bytes = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i / 8 * Bits)));
      const __m256i words = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, place), shift), mask);
      const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), narrow);
    }
  }
#endif
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

// Eight bytes each.
TORCHLIN_INLINE V<int64_t> words_at(const uint8_t* row, V<int64_t> byte) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<int64_t>)_mm512_mask_i64gather_epi64(_mm512_setzero_si512(), 0xff, (__m512i)byte, row, 1);
#elif TORCHLIN_ISA_BYTES == 32
  return (V<int64_t>)_mm256_i64gather_epi64(reinterpret_cast<const long long*>(row), (__m256i)byte, 1);
#else
  V<int64_t> words;
  for (int l = 0; l < kLanes<double>; ++l) {
    int64_t word;
    std::memcpy(&word, row + byte[l], 8);
    words[l] = word;
  }
  return words;
#endif
}

// Two digits in at most 16 bits. `size` words; two codes each.
inline void split_pairs(const uint16_t* words, int64_t size, uint32_t n, uint16_t* codes) {
  constexpr int W = kLanes<float>;
  using Narrow = typename vector_of<uint16_t, W>::type;
  const float inverse = 1.0f / n;
  const int32_t points = static_cast<int32_t>(n);
  for (int64_t i = 0; i < size; i += W) {
    Narrow narrow = {};
    const int64_t here = size - i < W ? size - i : W;
    if (here == W) std::memcpy(&narrow, words + i, sizeof narrow);
    else std::memcpy(&narrow, words + i, static_cast<size_t>(here) * 2);
    const V<int32_t> word = __builtin_convertvector(narrow, V<int32_t>);
    V<int32_t> high = __builtin_convertvector(__builtin_convertvector(word, V<float>) * inverse, V<int32_t>);  // or one less or more
    V<int32_t> low = word - high * points;
    high = low < 0 ? high - 1 : low >= points ? high + 1 : high;
    low = low < 0 ? low + points : low >= points ? low - points : low;
    high = high < points ? high : V<int32_t>{} + (points - 1);
    const V<int32_t> pairs = low | high << 16;
    std::memcpy(codes + 2 * i, &pairs, static_cast<size_t>(here) * 4);
  }
}

// Words of D digits, as many as a vector holds at a time, in doubles: division is a multiplication and at most one step down.
// Exact for words of up to 51 bits; codes below 2^16. Returns how many codes are done.
template <int D, class Code>
inline int64_t unpack_digits(const uint8_t* row, int64_t bytes, int width, uint32_t n, int64_t bit, int64_t size, Code* codes) {
  constexpr int L = kLanes<double>;
  using Bits = V<int64_t>;
  const double points = n, inverse = 1.0 / n;
  const uint64_t mask = (uint64_t{1} << width) - 1;
  const V<double> big = splat(0x1p52);
  Bits lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  int64_t i = 0;
  for (; i + L * D <= size && ((bit + (L - 1) * width) >> 3) + 8 <= bytes; i += L * D) {
    const Bits at = lane * width + bit;
    const Bits lanes = (Bits)((V<uint64_t>)words_at(row, at >> 3) >> (V<uint64_t>)(at & 7)) & static_cast<int64_t>(mask);
    bit += L * width;
    V<double> value = (V<double>)(lanes | (Bits)big) - big;
    Bits digits = {};
    unroll<D>([&](int d) __attribute__((always_inline)) {
      V<double> digit = value;
      if (d + 1 < D) {
        value = (value * inverse + big) - big;
        digit = digit - value * points;
        const Bits above = digit < 0;
        value = above ? value - 1 : value;
        digit = above ? digit + points : digit;
      }
      digit = digit < points ? digit : splat(points - 1);
      digits |= ((Bits)(digit + big) & 0xffff) << (16 * d);
    });
    alignas(64) uint64_t words[L];
    std::memcpy(words, &digits, sizeof digits);
    for (int l = 0; l < L; ++l) {
      if constexpr (sizeof(Code) == 2) {
        std::memcpy(codes + i + l * D, &words[l], 2 * D);
      } else {
        for (int d = 0; d < D; ++d) codes[i + l * D + d] = static_cast<Code>(words[l] >> (16 * d));
      }
    }
  }
  return i;
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
  int64_t i = 0;
  if constexpr (sizeof(Code) == 2) {
    if (layout.digits == 2 && layout.width <= 16 && bit % 8 == 0) {
      constexpr int64_t kWords = 256;
      alignas(64) uint16_t words[kWords];
      for (;;) {
        const int64_t some = std::min(kWords, (size - i) / 2);
        const int64_t done = unpack_eights_of(layout.width, row + bit / 8, some, bytes - bit / 8, words);
        if (done == 0) break;
        split_pairs(words, done, n, codes + i);
        i += 2 * done;
        bit += done * layout.width;
      }
    }
  }
  if (layout.width <= 51 && i < size) {
    const int64_t before = i;
    switch (layout.digits) {
      case 2: i += unpack_digits<2>(row, bytes, layout.width, n, bit, size - i, codes + i); break;
      case 3: i += unpack_digits<3>(row, bytes, layout.width, n, bit, size - i, codes + i); break;
      default: i += unpack_digits<4>(row, bytes, layout.width, n, bit, size - i, codes + i);
    }
    bit += (i - before) / layout.digits * layout.width;
  }
  for (; i < size; i += layout.digits, bit += layout.width) {
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
