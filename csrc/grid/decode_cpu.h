// Points of codes, and the weights that packed rows stand for, in their order.

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

// Codes are valid. A point is copied whole, with what fills it up, and the next overwrites that: `to` has room for
// kCopySlack floats more.
inline constexpr int kCopySlack = 8;

template <int P, class Code>
TORCHLIN_INLINE void copy_points(const Code* codes, int64_t size, const float* table, float* to) {
  constexpr int kStep = P <= 2 ? P : P <= 4 ? 4 : 8;
  for (int64_t i = 0; i < size; ++i) std::memcpy(to + i * P, table + int64_t{codes[i]} * kStep, kStep * sizeof(float));
}

// As many codes as give a vector of numbers, for P = 1 and, where a gather is quick, 2.
#if TORCHLIN_ISA_BYTES == 64
inline constexpr int kGathered = 2;
#else
inline constexpr int kGathered = 1;
#endif

template <int P, class Code>
TORCHLIN_INLINE V<float> gather_points(const float* table, const Code* codes) {
  static_assert(P <= kGathered);
#if TORCHLIN_ISA_BYTES == 64
  if constexpr (P == 2) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    __m256i at;
    if constexpr (sizeof(Code) == 1) at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    else at = _mm256_cvtepu16_epi32(narrow);
    return (V<float>)_mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, at, table, 8);
  }
  __m512i at;
  if constexpr (sizeof(Code) == 1) {
    at = _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  } else {
    at = _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
  return gather(table, (V<int32_t>)at);
#else
  typename vector_of<Code, kLanes<float>>::type narrow;
  std::memcpy(&narrow, codes, sizeof narrow);
  return gather(table, __builtin_convertvector(narrow, V<int32_t>));
#endif
}

template <int P, class Code>
TORCHLIN_INLINE void decode_points_of(const Code* codes, int64_t size, const float* table, float* to) {
  int64_t i = 0;
  if constexpr (P <= kGathered) {
    constexpr int kCodes = kLanes<float> / P;
    for (; i + kCodes <= size; i += kCodes) store(to + i * P, gather_points<P>(table, codes + i));
  }
  copy_points<P>(codes + i, size - i, table, to + i * P);
}

template <class Code>
inline void decode_points_of(int64_t p, const Code* codes, int64_t size, const float* table, float* to) {
  switch (p) {
    case 1: return decode_points_of<1>(codes, size, table, to);
    case 2: return decode_points_of<2>(codes, size, table, to);
    case 3: return decode_points_of<3>(codes, size, table, to);
    case 4: return decode_points_of<4>(codes, size, table, to);
    case 5: return decode_points_of<5>(codes, size, table, to);
    case 6: return decode_points_of<6>(codes, size, table, to);
    case 7: return decode_points_of<7>(codes, size, table, to);
    default: return decode_points_of<8>(codes, size, table, to);
  }
}

// Codes [begin, begin + size) of a row as points; `codes` is memory for as many.
inline void points_of_row(const grid::Weight& w, int64_t row, int64_t begin, int64_t size, const float* table, uint16_t* codes,
                          float* to) {
  const uint8_t* packed = w.packed + row * w.row_bytes;
  if (w.n == 256) return decode_points_of(w.p, packed + begin, size, table, to);
  unpack_codes(packed, w.row_bytes, w.layout, static_cast<uint32_t>(w.n), begin, size, codes);
  decode_points_of(w.p, codes, size, table, to);
}

// Numbers [begin, end) of a row, at `to`, times their scales.
inline void apply_scales(const grid::Weight& w, int64_t row, int64_t begin, int64_t end, float* to) {
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / w.block, until = std::min(end, w.block >= w.in ? w.in : (b + 1) * w.block);
    const float scale = scale_at(w, row, b);
    for (; i < until; ++i) to[i - begin] *= scale;
  }
}

inline constexpr int64_t kCodesAtATime = 48 * 16;  // whole words, and whole bytes

inline void dequantize_rows(const grid::Weight& w, const float* table, float* weight, int64_t begin, int64_t end) {
  alignas(64) uint16_t codes[kCodesAtATime];
  alignas(64) float points[kCodesAtATime * grid::kMostCoordinates + kCopySlack];
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < w.count; c += kCodesAtATime) {
      const int64_t first = c * w.p, last = std::min(w.in, (c + kCodesAtATime) * w.p);
      points_of_row(w, r, c, std::min(kCodesAtATime, w.count - c), table, codes, points);
      apply_scales(w, r, first, last, points);
      std::memcpy(weight + r * w.in + first, points, static_cast<size_t>(last - first) * sizeof(float));
    }
  }
}
