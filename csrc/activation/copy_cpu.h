// Between strided data of a storage type and dense blocks of its compute type, at the level being compiled.

template <class S>
void gather(const void* source, int64_t step, int64_t n, void* target) {
  using C = compute_of<S>;
  const S* from = static_cast<const S*>(source);
  C* to = static_cast<C*>(target);
  if (step == 1) {
    const int64_t whole = n - n % kLanes<C>;
    for (int64_t i = 0; i < whole; i += kLanes<C>) store(to + i, load(from + i));
    for (int64_t i = whole; i < n; ++i) to[i] = load_one(from + i);
  } else if (step == 0) {
    std::fill(to, to + n, load_one(from));
  } else if (step == 2) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + 2 * i);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + i * step);
  }
}

template <class S>
void scatter(const void* source, int64_t step, int64_t n, void* target) {
  using C = compute_of<S>;
  const C* from = static_cast<const C*>(source);
  S* to = static_cast<S*>(target);
  if (step == 1) {
    const int64_t whole = n - n % kLanes<C>;
    for (int64_t i = 0; i < whole; i += kLanes<C>) store(to + i, load(from + i));
    if (whole < n) store_n(to + whole, load_n(from + whole, n - whole), n - whole);
  } else {
    for (int64_t i = 0; i < n; ++i) store_one(to + i * step, from[i]);
  }
}

// Dense and aligned to vectors, past the caches: such stores read no line that they overwrite.
template <class C>
void stream(const void* source, int64_t n, void* target) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(C));
  for (int64_t i = 0; i < bytes; i += TORCHLIN_ISA_BYTES) {
#if TORCHLIN_ISA_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
#elif TORCHLIN_ISA_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
    std::memcpy(to + i, from + i, TORCHLIN_ISA_BYTES);
#endif
  }
}

const activation::Copies kCopies[] = {{gather<float>, scatter<float>, stream<float>},
                                      {gather<double>, scatter<double>, stream<double>},
                                      {gather<f16>, scatter<f16>, nullptr},
                                      {gather<bf16>, scatter<bf16>, nullptr}};
