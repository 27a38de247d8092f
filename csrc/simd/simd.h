// Vectors of float and double for the level being compiled; included by foreach_isa.h inside that level's namespace, once
// per level and file, hence no include guard. Arithmetic, comparison and ?: are the compiler's vector extensions; a*b + c
// is contracted to one FMA where the level has it. Intrinsics are used only for conversions.

#define TORCHLIN_INLINE inline __attribute__((always_inline))

template <class C>
inline constexpr int kLanes = TORCHLIN_ISA_BYTES / static_cast<int>(sizeof(C));

template <class C, int Lanes = kLanes<C>>
struct vector_of {
  typedef C type __attribute__((vector_size(Lanes * sizeof(C))));
};
template <class C>
using V = typename vector_of<C>::type;

// What a storage type is computed in.
template <class T>
using compute_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(0), ..., f(N-1), unrolled, so that arrays of vectors indexed by it live in registers.
template <int N, class F>
TORCHLIN_INLINE void unroll(F&& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(N - 1);
  }
}

template <class C>
TORCHLIN_INLINE V<C> splat(C x) {
  return x - V<C>{};  // not +: that would have to turn -0 into 0
}

// Hides a value from the optimiser, which would otherwise turn a multiplication by a known +-1 back into an addition.
template <class Vec>
TORCHLIN_INLINE void opaque(Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
}

template <int Mask, class C, int... I>
TORCHLIN_INLINE V<C> shuffle_xor_lanes(V<C> v, std::integer_sequence<int, I...>) {
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
#if defined(__clang__) || __GNUC__ >= 12
  // On integers: Intel runs vpshufd on two ports but the vpermilps that floats would get on one.
  return (V<C>)__builtin_shufflevector((V<Index>)v, (V<Index>)v, (I ^ Mask)...);
#else
  return (V<C>)__builtin_shuffle((V<Index>)v, V<Index>{(I ^ Mask)...});
#endif
}

// Lane i takes the value of lane i ^ Mask.
template <class C, int Mask>
TORCHLIN_INLINE V<C> shuffle_xor(V<C> v) {
  return shuffle_xor_lanes<Mask, C>(v, std::make_integer_sequence<int, kLanes<C>>{});
}

// ---- load and store with conversion; no alignment is assumed ----

TORCHLIN_INLINE V<float> load(const float* p) {
  V<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
TORCHLIN_INLINE V<double> load(const double* p) {
  V<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
TORCHLIN_INLINE void store(float* p, V<float> v) { std::memcpy(p, &v, sizeof v); }
TORCHLIN_INLINE void store(double* p, V<double> v) { std::memcpy(p, &v, sizeof v); }

#if TORCHLIN_ISA_BYTES == 64
// The maskz forms, because GCC 12 warns about its own header's undefined vectors in the plain ones. Same instructions.
inline constexpr __mmask16 kAll = 0xffff;
#endif

TORCHLIN_INLINE V<float> load(const f16* p) {
#if TORCHLIN_ISA_BYTES == 64
  return (V<float>)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif TORCHLIN_ISA_BYTES == 32
  return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  typedef __fp16 half4 __attribute__((vector_size(8)));
  half4 h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, V<float>);
#else
  return V<float>{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

TORCHLIN_INLINE void store(f16* p, V<float> v) {
#if TORCHLIN_ISA_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAll, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif TORCHLIN_ISA_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  typedef __fp16 half4 __attribute__((vector_size(8)));
  const half4 h = __builtin_convertvector(v, half4);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_f16(v[i]);
#endif
}

TORCHLIN_INLINE V<float> load(const bf16* p) {
#if TORCHLIN_ISA_BYTES == 64
  // Each to the upper half of its place by one shuffle.
  const __m512i h = _mm512_maskz_broadcast_i64x4(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const V<int32_t> place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (V<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)(place << 16), h);
#elif TORCHLIN_ISA_BYTES == 32
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (V<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  typename vector_of<uint16_t, kLanes<float>>::type h;
  std::memcpy(&h, p, sizeof h);
  return (V<float>)(__builtin_convertvector(h, V<uint32_t>) << 16);
#endif
}

// Round to nearest even. A NaN is made quiet or set to all ones, also a NaN, where rounding could have carried it over into a
// number.
TORCHLIN_INLINE void store(bf16* p, V<float> v) {
#if TORCHLIN_ISA_BYTES == 64
  const V<uint32_t> u = (V<uint32_t>)v, rounded = (u + 0x7fff) + ((u >> 16) & 1);
  const __m512i quiet_nan = _mm512_set1_epi32(0x22);  // a number stays, either NaN becomes its quiet self
  const __m512 bits = _mm512_fixupimm_ps((__m512)rounded, (__m512)v, quiet_nan, 0);
  const V<int32_t> place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i odd = (__m512i)((place << 18 | 0x30000) | (place << 2 | 1));
  const __m512i upper = _mm512_maskz_permutexvar_epi16(0xffffffffu, odd, (__m512i)bits);
  std::memcpy(p, &upper, 32);
#else
  const V<uint32_t> u = (V<uint32_t>)v;
  const V<uint32_t> bits = ((u + 0x7fff + ((u >> 16) & 1)) | (V<uint32_t>)(v != v)) >> 16;
#if TORCHLIN_ISA_BYTES == 32
  const __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  const auto h = __builtin_convertvector(bits, typename vector_of<uint16_t, kLanes<float>>::type);
  std::memcpy(p, &h, sizeof h);
#endif
#endif
}

// Every even (odd) lane of memory in its own place and its odd (even) neighbour's: a load that needs no shuffle unit.
#if TORCHLIN_ISA_BYTES == 64
TORCHLIN_INLINE V<float> load_even(const float* p) { return (V<float>)_mm512_maskz_moveldup_ps(kAll, _mm512_loadu_ps(p)); }
TORCHLIN_INLINE V<float> load_odd(const float* p) { return (V<float>)_mm512_maskz_movehdup_ps(kAll, _mm512_loadu_ps(p)); }
#elif TORCHLIN_ISA_BYTES == 32
TORCHLIN_INLINE V<float> load_even(const float* p) { return (V<float>)_mm256_moveldup_ps(_mm256_loadu_ps(p)); }
TORCHLIN_INLINE V<float> load_odd(const float* p) { return (V<float>)_mm256_movehdup_ps(_mm256_loadu_ps(p)); }
#endif

// The first n lanes (0 <= n <= lanes); the others read as zero, or are not written.
template <class T>
TORCHLIN_INLINE V<compute_of<T>> load_n(const T* p, int64_t n) {
  alignas(64) T lanes[kLanes<compute_of<T>>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
TORCHLIN_INLINE void store_n(T* p, V<compute_of<T>> v, int64_t n) {
  alignas(64) T lanes[kLanes<compute_of<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// One element, for tails and strided data.
TORCHLIN_INLINE float load_one(const float* p) { return *p; }
TORCHLIN_INLINE double load_one(const double* p) { return *p; }
TORCHLIN_INLINE float load_one(const f16* p) { return to_float(*p); }
TORCHLIN_INLINE float load_one(const bf16* p) { return to_float(*p); }
TORCHLIN_INLINE void store_one(float* p, float x) { *p = x; }
TORCHLIN_INLINE void store_one(double* p, double x) { *p = x; }
TORCHLIN_INLINE void store_one(f16* p, float x) { *p = to_f16(x); }
TORCHLIN_INLINE void store_one(bf16* p, float x) { *p = to_bf16(x); }
