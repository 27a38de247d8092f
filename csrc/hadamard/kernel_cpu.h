// The Hadamard transform on a CPU: raw pointers and sizes, no torch. Included by foreach_isa.h once per CPU level.
//
// A row of K * 2^k elements is K blocks of 2^k, transformed by butterflies, then H_K across the blocks. Butterfly stages
// run strictly from the lowest index bit to the highest, whatever the layout, blocking or number of threads, so all of them
// give the same bits. Three kinds of pass:
//   base     log2(lanes) stages inside vectors (one shuffle and one FMA by +-1 each), then some across registers,
//   legs     radix 2..16 across R vectors at a stride,
//   columns  stages at a big stride; more than a few of them in panels that go through a small scratch, since lines a large
//            power of two apart fall into one L1 set.
// Rows are blocked for L1 (kBlockBits), then for L2; beyond that they cross memory once per up to kColumnBits stages. Signs, scale
// and conversion are part of the first load and the last store.

using hadamard::CorePlan;
using hadamard::Dim;
using hadamard::Job;
using hadamard::Scratch;

template <class C>
inline constexpr int kLaneBits = kLanes<C> == 16 ? 4 : kLanes<C> == 8 ? 3 : kLanes<C> == 4 ? 2 : 1;
inline constexpr int kRadixBits = TORCHLIN_ISA_BYTES == 64 ? 4 : 3;  // registers: 32 or 16
inline constexpr int kFarRadixBits = 3;  // at big strides: no more legs than an L1 set has ways
template <class C>
inline constexpr int kBaseBits = kLaneBits<C> + kRadixBits;
template <class C>
inline constexpr int kWholeBits = kLaneBits<C> + 4;  // done as one base: a few spills cost less than a second pass
template <class C>
inline constexpr int kBlockBits = sizeof(C) == 8 ? 11 : 12;  // 16 KiB: half of the smallest L1 in use
inline constexpr int kColumnBits = 8;
template <class C>
inline constexpr int kPanelVectors = TORCHLIN_ISA_BYTES == 64 ? 2 : 4;  // two cache lines
template <class C>
inline constexpr int kPanel = kPanelVectors<C> * kLanes<C>;  // lanes of a panel of H_K

enum class In { raw, with_signs };
enum class Out { raw, scaled, with_signs };

template <In kIn, class T, class C>
TORCHLIN_INLINE V<C> load_in(const T* p, const C* signs) {
  if constexpr (kIn == In::with_signs) return load(p) * load(signs);
  return load(p);
}

template <Out kOut, class T, class C>
TORCHLIN_INLINE void store_out(T* p, V<C> v, C scale, const C* signs) {
  if constexpr (kOut != Out::raw) v = v * scale;
  if constexpr (kOut == Out::with_signs) v = v * load(signs);
  store(p, v);
}

template <class C, int Bit, int... I>
TORCHLIN_INLINE V<C> lane_signs(std::integer_sequence<int, I...>) {
  return V<C>{((I >> Bit) & 1 ? C(-1) : C(1))...};
}

// Stages First..Last-1 inside a vector.
template <class C, int First, int Last>
TORCHLIN_INLINE V<C> lane_stages(V<C> v) {
  if constexpr (First < Last) {
    const V<C> signs = lane_signs<C, First>(std::make_integer_sequence<int, kLanes<C>>{});
    return lane_stages<C, First + 1, Last>(v * signs + shuffle_xor<C, (1 << First)>(v));
  } else {
    return v;
  }
}

// All stages inside a vector, from memory. The first one of plain floats needs no shuffle: two loads and an FMA.
template <In kIn, class T, class C>
TORCHLIN_INLINE V<C> load_lane_stages(const T* p, const C* signs) {
  constexpr int kAllBits = kLaneBits<C>;
#if TORCHLIN_ISA_BYTES >= 32
  if constexpr (kIn == In::raw && std::is_same_v<T, float>) {
    const V<C> first = lane_signs<C, 0>(std::make_integer_sequence<int, kLanes<C>>{});
    return lane_stages<C, 1, kAllBits>(load_odd(p) * first + load_even(p));
  }
#endif
  return lane_stages<C, 0, kAllBits>(load_in<kIn>(p, signs));
}

// log2(R) stages across R registers. On CPUs whose adders and FMA units are different ports, subtracting by an FMA keeps
// both busy; where they are the same (AVX-512) it is an addition like any other.
template <int R, class C>
TORCHLIN_INLINE void register_stages(V<C>* v, V<C> minus_one) {
  if constexpr (R > 1) {
    register_stages<R / 2, C>(v, minus_one);
    register_stages<R / 2, C>(v + R / 2, minus_one);
    unroll<R / 2>([&](int i) __attribute__((always_inline)) {
      const V<C> a = v[i], b = v[i + R / 2];
      v[i] = a + b;
      if constexpr (TORCHLIN_ISA_BYTES == 32) {
        v[i + R / 2] = b * minus_one + a;
      } else {
        v[i + R / 2] = a - b;
      }
    });
  }
}

template <class C>
TORCHLIN_INLINE V<C> opaque_minus_one() {
  V<C> m = splat<C>(-1);
  if constexpr (TORCHLIN_ISA_BYTES == 32) opaque(m);
  return m;
}

// ---- base: `count` contiguous transforms of R * lanes elements ----

template <int R, In kIn, Out kOut, class TI, class TO, class C>
void base(const TI* src, int64_t src_step, TO* dst, int64_t dst_step, int64_t count, const C* signs, int64_t sign_step,
          C scale) {
  constexpr int W = kLanes<C>;
  const V<C> minus_one = opaque_minus_one<C>();
  for (int64_t i = 0; i < count; ++i, src += src_step, dst += dst_step, signs += sign_step) {
    V<C> v[R];
    unroll<R>([&](int r) __attribute__((always_inline)) {
      v[r] = load_lane_stages<kIn>(src + r * W, signs + r * W);
    });
    register_stages<R, C>(v, minus_one);
    unroll<R>([&](int r) __attribute__((always_inline)) { store_out<kOut>(dst + r * W, v[r], scale, signs + r * W); });
  }
}

template <In kIn, Out kOut, class TI, class TO, class C>
void base_of(int bits, const TI* src, int64_t src_step, TO* dst, int64_t dst_step, int64_t count, const C* signs,
             int64_t sign_step, C scale) {
  switch (bits - kLaneBits<C>) {
    case 0: return base<1, kIn, kOut>(src, src_step, dst, dst_step, count, signs, sign_step, scale);
    case 1: return base<2, kIn, kOut>(src, src_step, dst, dst_step, count, signs, sign_step, scale);
    case 2: return base<4, kIn, kOut>(src, src_step, dst, dst_step, count, signs, sign_step, scale);
    case 3: return base<8, kIn, kOut>(src, src_step, dst, dst_step, count, signs, sign_step, scale);
    case 4: return base<16, kIn, kOut>(src, src_step, dst, dst_step, count, signs, sign_step, scale);
  }
}

// ---- packed: transforms shorter than a vector, lying one after another; `signs` repeats with the period of a vector or
// runs along with the data ----

template <int Bits, In kIn, Out kOut, class TI, class TO, class C>
void packed(const TI* src, TO* dst, int64_t total, const C* signs, bool signs_run, C scale) {
  constexpr int W = kLanes<C>;
  int64_t i = 0;
  for (; i + W <= total; i += W) {
    const C* s = signs_run ? signs + i : signs;
    store_out<kOut>(dst + i, lane_stages<C, 0, Bits>(load_in<kIn>(src + i, s)), scale, s);
  }
  if (const int64_t rest = total - i; rest > 0) {
    const C* s = signs_run ? signs + i : signs;
    V<C> v = load_n(src + i, rest);
    if constexpr (kIn == In::with_signs) v = v * load_n(s, rest);
    v = lane_stages<C, 0, Bits>(v);
    if constexpr (kOut != Out::raw) v = v * scale;
    if constexpr (kOut == Out::with_signs) v = v * load_n(s, rest);
    store_n(dst + i, v, rest);
  }
}

template <In kIn, Out kOut, class TI, class TO, class C>
void packed_of(int bits, const TI* src, TO* dst, int64_t total, const C* signs, bool signs_run, C scale) {
  switch (bits) {
    case 0: return packed<0, kIn, kOut>(src, dst, total, signs, signs_run, scale);
    case 1: return packed<1, kIn, kOut>(src, dst, total, signs, signs_run, scale);
    case 2:
      if constexpr (kLaneBits<C> > 2) return packed<2, kIn, kOut>(src, dst, total, signs, signs_run, scale);
      break;
    case 3:
      if constexpr (kLaneBits<C> > 3) return packed<3, kIn, kOut>(src, dst, total, signs, signs_run, scale);
      break;
  }
}

// ---- legs: butterflies over R vectors a leg apart, for `width` (a multiple of the lanes) columns, `count` times ----

template <class TO, class C>
struct Legs {
  const C* in;
  int64_t in_leg, in_next;
  TO* out;
  int64_t out_leg, out_next;
  int64_t count, width;
  const C* signs = nullptr;  // Out::with_signs only; laid out as `out`
  C scale = 1;
};

// One loop, without a branch between a row of columns and the next: rows are often four to eight vectors short, and
// leaving so short a loop is mispredicted each time.
template <int R, Out kOut, class TO, class C>
void run_legs(const Legs<TO, C>& p) {
  constexpr int W = kLanes<C>;
  const V<C> minus_one = opaque_minus_one<C>();
  const C *in = p.in, *signs = p.signs;
  TO* out = p.out;
  const int64_t in_leg = p.in_leg, out_leg = p.out_leg, width = p.width;
  const int64_t in_skip = p.in_next - width, out_skip = p.out_next - width;
  int64_t column = 0;
  for (int64_t i = p.count * width / W; i > 0; --i) {
    V<C> v[R];
    unroll<R>([&](int r) __attribute__((always_inline)) { v[r] = load(in + r * in_leg); });
    register_stages<R, C>(v, minus_one);
    unroll<R>([&](int r) __attribute__((always_inline)) { store_out<kOut>(out + r * out_leg, v[r], p.scale, signs + r * out_leg); });
    column += W;
    const int64_t wrap = -static_cast<int64_t>(column == width);
    column &= ~wrap;
    in += W + (in_skip & wrap);
    out += W + (out_skip & wrap);
    if constexpr (kOut == Out::with_signs) signs += W + (out_skip & wrap);
  }
}

template <Out kOut, class TO, class C>
void run_legs_of(int bits, const Legs<TO, C>& p) {
  switch (bits) {
    case 1: return run_legs<2, kOut>(p);
    case 2: return run_legs<4, kOut>(p);
    case 3: return run_legs<8, kOut>(p);
    case 4: return run_legs<16, kOut>(p);
  }
}

// How many of `bits` stages the next pass takes: as few passes as possible, as even as possible.
inline int next_radix(int bits) {
  const int passes = (bits + kRadixBits - 1) / kRadixBits;
  return (bits + passes - 1) / passes;
}

// Stages over x[copies][2^bits][row], the last pass into `out` of the same layout.
template <Out kOut, class TO, class C>
void stages(C* x, TO* out, int64_t row, int bits, const C* signs, C scale, int64_t copies = 1) {
  int64_t leg = row, groups = copies << bits;
  while (bits > 0) {
    // Sixteen legs spill on 16 registers, and fall into one L1 set at big strides; near by they still beat a second pass.
    const int take = bits == 4 && leg * sizeof(C) <= 1024 ? 4 : next_radix(bits);
    bits -= take;
    groups >>= take;
    const int64_t group = leg << take;
    if (bits > 0) {
      run_legs_of<Out::raw>(take, Legs<C, C>{x, leg, group, x, leg, group, groups, leg});
    } else {
      run_legs_of<kOut>(take, Legs<TO, C>{x, leg, group, out, leg, group, groups, leg, signs, scale});
    }
    leg = group;
  }
}

// ---- columns: all stages over 2^bits rows `leg` apart, columns [begin, end) of them (multiples of the lanes) ----

template <Out kOut, class TO, class C>
void columns(const C* x, TO* out, int64_t leg, int bits, int64_t begin, int64_t end, const C* signs, C scale) {
  if (bits <= kFarRadixBits) {
    return run_legs_of<kOut>(
        bits, Legs<TO, C>{x + begin, leg, 0, out + begin, leg, 0, 1, end - begin, signs + begin, scale});
  }
  // Wide enough to be worth the strides, in L1 if possible.
  const int64_t rows = int64_t{1} << bits, width = std::max<int64_t>((int64_t{1} << kBlockBits<C>) >> bits, 256 / sizeof(C));
  C* panel = Scratch::get<C>(Scratch::kPanel, rows * width);
  const int passes = std::max(2, (bits + kRadixBits - 1) / kRadixBits);
  const int first = (bits + passes - 1) / passes, last = (bits - first + passes - 2) / (passes - 1);
  const int middle = bits - first - last;
  for (int64_t c = begin; c < end; c += width) {
    const int64_t w = std::min(width, end - c), r = int64_t{1} << first;
    run_legs_of<Out::raw>(first, Legs<C, C>{x + c, leg, leg * r, panel, w, w * r, rows >> first, w});
    if (middle > 0) {
      const int64_t done = w << first;
      run_legs_of<Out::raw>(middle, Legs<C, C>{panel, done, done << middle, panel, done, done << middle,
                                               rows >> (first + middle), done});
    }
    const int64_t sets = rows >> last;
    run_legs_of<kOut>(last, Legs<TO, C>{panel, w * sets, w, out + c, leg * sets, leg, sets, w, signs + c, scale});
  }
}

// ---- one contiguous power of two ----

// How many of the highest stages are done across blocks: one pass at a time while L2 holds the row, beyond that as many as
// a panel takes, for fewer trips to memory.
template <class C>
int column_bits(int bits) {
  constexpr int kL2Bits = kBlockBits<C> + 6;  // 1 MiB
  return bits <= kL2Bits ? kFarRadixBits : std::min(kColumnBits, bits - kBlockBits<C> - 2);
}

// All stages of 2^bits elements, unscaled, into compute-type memory (src may be that memory).
template <In kIn, class T, class C>
void lower(const T* src, C* work, int bits, const C* signs) {
  constexpr int kBase = kBaseBits<C>;
  if (bits <= kWholeBits<C>) {
    if (bits < kLaneBits<C>) return packed_of<kIn, Out::raw>(bits, src, work, int64_t{1} << bits, signs, true, C(1));
    return base_of<kIn, Out::raw>(bits, src, 0, work, 0, 1, signs, 0, C(1));
  }
  if (bits <= kBlockBits<C>) {
    constexpr int64_t n = int64_t{1} << kBase;
    base<1 << kRadixBits, kIn, Out::raw>(src, n, work, n, int64_t{1} << (bits - kBase), signs, kIn == In::raw ? 0 : n, C(1));
    return stages<Out::raw>(work, work, n, bits - kBase, static_cast<const C*>(nullptr), C(1));
  }
  const int above = column_bits<C>(bits);
  const int64_t leg = int64_t{1} << (bits - above);
  for (int64_t b = 0; b < (int64_t{1} << above); ++b) {
    lower<kIn>(src + b * leg, work + b * leg, bits - above, kIn == In::raw ? signs : signs + b * leg);
  }
  columns<Out::raw>(work, work, leg, above, 0, leg, static_cast<const C*>(nullptr), C(1));
}

// Stages over a panel x[2^bits][row] in compute-type memory, in place, blocked for L1.
template <class C>
void panel_stages(C* x, int64_t row, int bits) {
  int block = 0;
  while (block < bits && (row << (block + 1)) <= (int64_t{1} << kBlockBits<C>)) ++block;
  if (block == bits || block == 0) return stages<Out::raw>(x, x, row, bits, static_cast<const C*>(nullptr), C(1));
  const int above = std::min(kColumnBits, bits - block);
  const int64_t leg = row << (bits - above);
  for (int64_t b = 0; b < (int64_t{1} << above); ++b) panel_stages(x + b * leg, row, bits - above);
  columns<Out::raw>(x, x, leg, above, 0, leg, static_cast<const C*>(nullptr), C(1));
}

// ---- H_K across K slots of a panel (see CorePlan) ----

// All combinations of G vectors up to sign, `pitch` lanes apart, in the order of combination_index.
template <int G, class C>
TORCHLIN_INLINE void combinations(const V<C>* x, C* table, int64_t pitch) {
  if constexpr (G == 1) {
    store(table, x[0]);
  } else {
    constexpr int kFirst = (G + 1) / 2, kSecond = G - kFirst, kA = 1 << (kFirst - 1), kB = 1 << (kSecond - 1);
    V<C> a[kA], b[kB];
    const auto expand = [](const V<C>* in, int count, V<C>* out) __attribute__((always_inline)) {
      out[0] = in[0];
      if (count > 1) {
        out[1] = in[0] - in[1];
        out[0] = in[0] + in[1];
      }
      if (count > 2) {
        out[2] = out[0] - in[2];
        out[3] = out[1] - in[2];
        out[0] = out[0] + in[2];
        out[1] = out[1] + in[2];
      }
    };
    expand(x, kFirst, a);
    expand(x + kFirst, kSecond, b);
    unroll<kA * kB>([&](int i) __attribute__((always_inline)) {
      store(table + (2 * i) * pitch, a[i / kB] + b[i % kB]);
      store(table + (2 * i + 1) * pitch, a[i / kB] - b[i % kB]);
    });
  }
}

template <int G, bool Paired, int NV, class C>
void make_table(const C* x, int64_t pitch, C* table, int64_t second_half) {
  constexpr int W = kLanes<C>;
  unroll<NV>([&](int q) __attribute__((always_inline)) {
    V<C> u[G], v[G];
    unroll<G>([&](int g) __attribute__((always_inline)) {
      if constexpr (Paired) {
        const V<C> a = load(x + 2 * g * pitch + q * W), b = load(x + (2 * g + 1) * pitch + q * W);
        u[g] = a + b;
        v[g] = a - b;
      } else {
        u[g] = load(x + g * pitch + q * W);
      }
    });
    combinations<G, C>(u, table + q * W, NV * W);
    if constexpr (Paired) combinations<G, C>(v, table + second_half + q * W, NV * W);
  });
}

template <bool Paired, int NV, class C>
void make_tables(const CorePlan& plan, const CorePlan::Chunk& chunk, const C* x, int64_t pitch, C* table,
                 int64_t second_half) {
  for (int32_t g = chunk.first_group; g < chunk.first_group + chunk.groups; ++g) {
    const CorePlan::Group& group = plan.groups[g];
    const C* from = x + group.column * (Paired ? 2 : 1) * pitch;
    C* to = table + group.entry * (NV * kLanes<C>);
    switch (group.width) {
      case 1: make_table<1, Paired, NV>(from, pitch, to, second_half); break;
      case 2: make_table<2, Paired, NV>(from, pitch, to, second_half); break;
      case 3: make_table<3, Paired, NV>(from, pitch, to, second_half); break;
      case 4: make_table<4, Paired, NV>(from, pitch, to, second_half); break;
      case 5: make_table<5, Paired, NV>(from, pitch, to, second_half); break;
      case 6: make_table<6, Paired, NV>(from, pitch, to, second_half); break;
    }
  }
}

// One chunk: slot r of vector q of `to` (to[q] + r * leg) becomes what it was in `sums`, or nothing yet if first, plus the
// row's terms, times scale. Loops over a handful of terms would be left by a mispredicted branch each time, hence kGroups;
// a few rows side by side, or every addition would wait for the one before.
template <int kGroups, bool Paired, int NV, class C>
void core_rows_of(const CorePlan& plan, const CorePlan::Chunk& chunk, bool first, const C* x, int64_t pitch, const C* sums,
                  C* const* to, int64_t leg, C scale, const C* table, int64_t second_half) {
  constexpr int W = kLanes<C>, kCols = NV * W, kSlots = CorePlan::kSlotBlock, kRows = Paired ? kSlots / 2 : kSlots;
  const CorePlan::Term* terms = plan.terms.data() + chunk.first_term;
  for (int32_t slot = 0; slot < plan.K; slot += kSlots, terms += kGroups * kRows) {
    V<C> y[kSlots][NV];
    unroll<kSlots>([&](int r) __attribute__((always_inline)) {
      unroll<NV>([&](int q) __attribute__((always_inline)) {
        if (!first) {
          y[r][q] = load(sums + (slot + r) * kCols + q * W);
        } else if constexpr (Paired) {
          y[r][q] = load(x + (slot + (r ^ 1)) * pitch + q * W) * C(plan.extras[(slot + r) / 2]);
        } else {
          y[r][q] = V<C>{};
        }
      });
    });
    unroll<kGroups>([&](int g) __attribute__((always_inline)) {
      unroll<kRows>([&](int r) __attribute__((always_inline)) {
        const CorePlan::Term term = terms[g * kRows + r];
        const C* entry = table + static_cast<int64_t>(term.entry) * kCols;
        const V<C> sign = splat<C>(term.sign);
        unroll<NV>([&](int q) __attribute__((always_inline)) {
          if constexpr (Paired) {
            y[2 * r][q] = load(entry + q * W) * sign + y[2 * r][q];
            y[2 * r + 1][q] = load(entry + second_half + q * W) * sign + y[2 * r + 1][q];
          } else {
            y[r][q] = load(entry + q * W) * sign + y[r][q];
          }
        });
      });
    });
    unroll<kSlots>([&](int r) __attribute__((always_inline)) {
      unroll<NV>([&](int q) __attribute__((always_inline)) { store(to[q] + (slot + r) * leg, y[r][q] * scale); });
    });
  }
}

template <bool Paired, int NV, class C>
constexpr auto core_rows_table() {
  return std::array{&core_rows_of<1, Paired, NV, C>, &core_rows_of<2, Paired, NV, C>, &core_rows_of<3, Paired, NV, C>,
                    &core_rows_of<4, Paired, NV, C>, &core_rows_of<5, Paired, NV, C>, &core_rows_of<6, Paired, NV, C>,
                    &core_rows_of<7, Paired, NV, C>, &core_rows_of<8, Paired, NV, C>};
}

// y = scale * H_K x (* signs) for NV vectors of columns: slot j of vector q is x + j * pitch + q * lanes, and goes to
// out[q] + j * leg. A slot of x is read before any of y is written, or, when paired, at the latest with its own pair:
// working in place is fine.
template <int NV, bool Paired, Out kOut, class T, class C>
void apply_core(const CorePlan& plan, const C* x, int64_t pitch, T* const* out, int64_t leg, const C* const* signs, C scale) {
  static constexpr auto kRows = core_rows_table<Paired, NV, C>();
  static_assert(kRows.size() == CorePlan::kChunkGroups);
  constexpr int W = kLanes<C>, kCols = NV * W;
  constexpr bool kDirect = std::is_same_v<T, C> && kOut != Out::with_signs;  // else the last sums are converted in a pass
  const int64_t second_half = Paired ? int64_t{plan.max_entries} * kCols : 0;
  C* table = Scratch::get<C>(Scratch::kTable, int64_t{plan.max_entries} * kCols * (Paired ? 2 : 1));
  const size_t last = plan.chunks.size() - 1;
  C* sums = last > 0 || !kDirect ? Scratch::get<C>(Scratch::kSums, int64_t{plan.K} * kCols) : nullptr;
  C* partial[NV];
  for (int q = 0; q < NV; ++q) partial[q] = sums + q * W;
  for (size_t c = 0; c <= last; ++c) {
    const CorePlan::Chunk& chunk = plan.chunks[c];
    make_tables<Paired, NV>(plan, chunk, x, pitch, table, second_half);
    const auto rows = kRows[chunk.groups - 1];
    if constexpr (kDirect) {
      if (c == last) {
        rows(plan, chunk, c == 0, x, pitch, sums, out, leg, kOut == Out::scaled ? scale : C(1), table, second_half);
        continue;
      }
    }
    rows(plan, chunk, c == 0, x, pitch, sums, partial, kCols, C(1), table, second_half);
  }
  if constexpr (!kDirect) {
    for (int32_t slot = 0; slot < plan.K; ++slot) {
      unroll<NV>([&](int q) __attribute__((always_inline)) {
        store_out<kOut>(out[q] + slot * leg, load(sums + slot * kCols + q * W), scale,
                        kOut == Out::with_signs ? signs[q] + slot * leg : nullptr);
      });
    }
  }
}

template <int NV, Out kOut, class T, class C>
void apply_core(const CorePlan& plan, const C* x, int64_t pitch, T* const* out, int64_t leg, const C* const* signs, C scale) {
  if (plan.paired) return apply_core<NV, true, kOut>(plan, x, pitch, out, leg, signs, scale);
  apply_core<NV, false, kOut>(plan, x, pitch, out, leg, signs, scale);
}

// The columns [begin, end) (multiples of the lanes) of K slots `pitch` apart, to slots `pitch` apart.
template <Out kOut, class T, class C>
void core_columns(const CorePlan& plan, const C* x, int64_t pitch, T* out, int64_t begin, int64_t end, const C* signs, C scale) {
  constexpr int W = kLanes<C>, NV = kPanelVectors<C>;
  T* to[NV];
  const C* s[NV] = {};
  const auto aim = [&](int64_t c, int vectors) {
    for (int q = 0; q < vectors; ++q) {
      to[q] = out + c + q * W;
      if constexpr (kOut == Out::with_signs) s[q] = signs + c + q * W;
    }
  };
  int64_t c = begin;
  for (; c + NV * W <= end; c += NV * W) {
    aim(c, NV);
    apply_core<NV, kOut>(plan, x + c, pitch, to, pitch, s, scale);
  }
  for (; c < end; c += W) {
    aim(c, 1);
    apply_core<1, kOut>(plan, x + c, pitch, to, pitch, s, scale);
  }
}

// ---- contiguous rows ----

// A long row is done in two steps, each of which can be shared by threads: its blocks, then columns across the blocks.
struct Split {
  int64_t blocks = 1, width = 0;
};

template <class C>
Split split_row(const Job& job) {
  const int64_t part = job.order / (job.core ? job.core->K : 1);
  if (job.core) return part >= kPanel<C> ? Split{job.core->K, part} : Split{};
  if (job.log2 <= kBlockBits<C>) return {};
  const int above = column_bits<C>(job.log2);
  return {int64_t{1} << above, job.order >> above};
}

template <class T, class C>
void split_blocks(const Job& job, const Split& split, const T* src, C* work, const C* signs, int64_t begin, int64_t end) {
  int bits = 0;
  while ((int64_t{1} << bits) < split.width) ++bits;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * split.width;
    if (signs != nullptr && !job.signs_last) {
      lower<In::with_signs>(src + at, work + at, bits, signs + at);
    } else {
      lower<In::raw>(src + at, work + at, bits, signs);
    }
  }
}

template <class T, class C>
void split_columns(const Job& job, const Split& split, const C* work, T* dst, const C* signs, int64_t begin, int64_t end) {
  int above = 0;
  while ((int64_t{1} << above) < split.blocks) ++above;
  const C scale = static_cast<C>(job.scale);
  if (signs != nullptr && job.signs_last) {
    if (job.core) return core_columns<Out::with_signs>(*job.core, work, split.width, dst, begin, end, signs, scale);
    return columns<Out::with_signs>(work, dst, split.width, above, begin, end, signs, scale);
  }
  if (job.core) return core_columns<Out::scaled>(*job.core, work, split.width, dst, begin, end, signs, scale);
  columns<Out::scaled>(work, dst, split.width, above, begin, end, signs, scale);
}

// Where the rows of `job` that go through compute-type memory are kept: in `dst` itself if it has that type.
template <class T, class C>
C* work_row(T* dst, int64_t count) {
  if constexpr (std::is_same_v<T, C>) return dst;
  return Scratch::get<C>(Scratch::kRow, count);
}

// Composite rows whose 2^log2 is less than a panel: several rows share one.
template <class T, class C>
void core_rows(const Job& job, const T* src, int64_t src_step, T* dst, int64_t dst_step, int64_t count, const C* signs,
               int64_t sign_step) {
  constexpr int W = kLanes<C>, NV = kPanelVectors<C>, P = kPanel<C>;
  const int K = job.core->K;
  const int64_t part = int64_t{1} << job.log2, together = P / part;
  const bool first = signs != nullptr && !job.signs_last, last = signs != nullptr && job.signs_last;
  const C scale = static_cast<C>(job.scale);
  C* panel = Scratch::get<C>(Scratch::kPanel, int64_t{K} * P);
  C* row = part < W ? Scratch::get<C>(Scratch::kPacked, job.order + W) : nullptr;
  for (int64_t r = 0; r < count; r += together) {
    const int64_t rows = std::min(together, count - r);
    for (int64_t q = 0; q < rows; ++q) {
      const T* from = src + (r + q) * src_step;
      const C* s = signs == nullptr ? nullptr : signs + (r + q) * sign_step;
      C* to = panel + q * part;
      if (part >= W) {
        if (first) {
          base_of<In::with_signs, Out::raw>(job.log2, from, part, to, P, K, s, part, C(1));
        } else {
          base_of<In::raw, Out::raw>(job.log2, from, part, to, P, K, s, 0, C(1));
        }
        continue;
      }
      if (first) {
        packed_of<In::with_signs, Out::raw>(job.log2, from, row, job.order, s, true, C(1));
      } else {
        packed_of<In::raw, Out::raw>(job.log2, from, row, job.order, s, true, C(1));
      }
      for (int j = 0; j < K; ++j) {
        for (int64_t c = 0; c < part; ++c) to[j * P + c] = row[j * part + c];
      }
    }
    if (part >= W) {
      T* to[NV];
      const C* s[NV] = {};
      const int vectors = static_cast<int>(rows * part / W);
      for (int v = 0; v < vectors; ++v) {
        const int64_t q = v * W / part, c = v * W % part;
        to[v] = dst + (r + q) * dst_step + c;
        if (last) s[v] = signs + (r + q) * sign_step + c;
      }
      if (vectors == NV) {
        if (last) {
          apply_core<NV, Out::with_signs>(*job.core, panel, P, to, part, s, scale);
        } else {
          apply_core<NV, Out::scaled>(*job.core, panel, P, to, part, s, scale);
        }
      } else {
        for (int v = 0; v < vectors; ++v) {
          if (last) {
            apply_core<1, Out::with_signs>(*job.core, panel + v * W, P, to + v, part, s + v, scale);
          } else {
            apply_core<1, Out::scaled>(*job.core, panel + v * W, P, to + v, part, s + v, scale);
          }
        }
      }
      continue;
    }
    C* to[NV];
    const C* s[NV] = {};
    const int vectors = static_cast<int>((rows * part + W - 1) / W);
    for (int64_t q = rows * part; q < vectors * W; ++q) {
      for (int j = 0; j < K; ++j) panel[j * P + q] = 0;
    }
    for (int v = 0; v < vectors; ++v) {
      to[v] = panel + v * W;
      apply_core<1, Out::scaled>(*job.core, panel + v * W, P, to + v, P, s, scale);
    }
    for (int64_t q = 0; q < rows; ++q) {
      const C* sq = last ? signs + (r + q) * sign_step : nullptr;
      T* out = dst + (r + q) * dst_step;
      for (int j = 0; j < K; ++j) {
        for (int64_t c = 0; c < part; ++c) {
          const C y = panel[j * P + q * part + c];
          store_one(out + j * part + c, last ? y * sq[j * part + c] : y);
        }
      }
    }
  }
}

// `count` rows with element stride 1.
template <class T, class C>
void contiguous_rows(const Job& job, const T* src, int64_t src_step, T* dst, int64_t dst_step, int64_t count, const C* signs,
                     int64_t sign_step) {
  constexpr int kBase = kBaseBits<C>;
  const C scale = static_cast<C>(job.scale);
  const bool first = signs != nullptr && !job.signs_last, last = signs != nullptr && job.signs_last;
  const int64_t n = job.order;
  const Split split = split_row<C>(job);
  if (split.width > 0) {
    C* work = work_row<T, C>(nullptr, n);
    for (int64_t r = 0; r < count; ++r, src += src_step, dst += dst_step, signs += sign_step) {
      if constexpr (std::is_same_v<T, C>) work = dst;
      split_blocks<T, C>(job, split, src, work, signs, 0, split.blocks);
      split_columns<T, C>(job, split, work, dst, signs, 0, split.width);
    }
    return;
  }
  if (job.core) return core_rows<T, C>(job, src, src_step, dst, dst_step, count, signs, sign_step);
  if (job.log2 < kLaneBits<C>) {
    // Packed if the rows touch; signs of a block dimension run along, others repeat.
    const bool signs_run = sign_step == n;
    alignas(64) C repeated[kLanes<C>];
    if (signs != nullptr && !signs_run) {
      for (int i = 0; i < kLanes<C>; ++i) repeated[i] = signs[i % n];
    }
    const C* s = signs_run ? signs : repeated;
    if (first) return packed_of<In::with_signs, Out::scaled>(job.log2, src, dst, count * n, s, signs_run, scale);
    if (last) return packed_of<In::raw, Out::with_signs>(job.log2, src, dst, count * n, s, signs_run, scale);
    return packed_of<In::raw, Out::scaled>(job.log2, src, dst, count * n, s, signs_run, scale);
  }
  if (job.log2 <= kWholeBits<C>) {
    if (first) return base_of<In::with_signs, Out::scaled>(job.log2, src, src_step, dst, dst_step, count, signs, sign_step, scale);
    if (last) return base_of<In::raw, Out::with_signs>(job.log2, src, src_step, dst, dst_step, count, signs, sign_step, scale);
    return base_of<In::raw, Out::scaled>(job.log2, src, src_step, dst, dst_step, count, signs, sign_step, scale);
  }
  // Rows that touch go through each pass together, as many as fit a block: every loop left costs a mispredicted branch.
  const bool touch = src_step == n && dst_step == n && (signs == nullptr || sign_step == n);
  const int64_t together = touch ? std::min(count, std::max<int64_t>(1, (int64_t{1} << kBlockBits<C>) / n)) : 1;
  C* work = work_row<T, C>(nullptr, together * n);
  constexpr int64_t b = int64_t{1} << kBase;
  for (int64_t r = 0; r < count; r += together) {
    const int64_t rows = std::min(together, count - r);
    if constexpr (std::is_same_v<T, C>) work = dst;
    if (first) {
      base<1 << kRadixBits, In::with_signs, Out::raw>(src, b, work, b, rows * n / b, signs, b, scale);
    } else {
      base<1 << kRadixBits, In::raw, Out::raw>(src, b, work, b, rows * n / b, signs, 0, scale);
    }
    if (last) {
      stages<Out::with_signs>(work, dst, b, job.log2 - kBase, signs, scale, rows);
    } else {
      stages<Out::scaled>(work, dst, b, job.log2 - kBase, signs, scale, rows);
    }
    src += rows * src_step;
    dst += rows * dst_step;
    if (signs != nullptr) signs += rows * sign_step;
  }
}

// ---- any strides: gather some rows, transform them where they are contiguous, scatter ----

template <class T, class C>
void strided_rows(const Job& job, const T* src, int64_t src_step, T* dst, int64_t dst_step, int64_t count, const C* signs,
                  int64_t sign_step) {
  const int64_t n = job.order, together = std::min(count, std::max<int64_t>(1, 1024 / n));
  C* rows = Scratch::get<C>(Scratch::kGathered, together * n + kLanes<C>);
  for (int64_t r = 0; r < count; r += together) {
    const int64_t m = std::min(together, count - r);
    for (int64_t q = 0; q < m; ++q) {
      const T* from = src + (r + q) * src_step;
      for (int64_t i = 0; i < n; ++i) rows[q * n + i] = load_one(from + i * job.src_step);
    }
    contiguous_rows<C, C>(job, rows, n, rows, n, m, signs == nullptr ? nullptr : signs + r * sign_step, sign_step);
    for (int64_t q = 0; q < m; ++q) {
      T* to = dst + (r + q) * dst_step;
      for (int64_t i = 0; i < n; ++i) store_one(to + i * job.dst_step, rows[q * n + i]);
    }
  }
}

// ---- a strided dim whose neighbours are contiguous: rows side by side, vectorised across them ----

template <class C>
int64_t panel_width(const Job& job) {
  // At least a cache line, more while the panel stays in L2.
  int64_t width = kPanel<C>;
  while (width > kLanes<C> && width * static_cast<int64_t>(sizeof(C)) > 64 && width * job.order * sizeof(C) > (256 << 10)) {
    width /= 2;
  }
  return width;
}

template <class T, class C>
void panel(const Job& job, const T* src, T* dst, int64_t cols, const C* signs) {
  constexpr int W = kLanes<C>;
  const int64_t n = job.order, w = (cols + W - 1) / W * W, part = int64_t{1} << job.log2;
  C* x = Scratch::get<C>(Scratch::kGathered, n * w);
  const bool first = signs != nullptr && !job.signs_last, last = signs != nullptr && job.signs_last;
  const int64_t whole = cols / W * W, rest = cols - whole;
  for (int64_t i = 0; i < n; ++i) {
    const T* from = src + i * job.src_step;
    const C s = first ? signs[i] : C(1);
    for (int64_t c = 0; c < whole; c += W) store(x + i * w + c, load(from + c) * s);
    if (rest > 0) store(x + i * w + whole, load_n(from + whole, rest) * s);
  }
  const int64_t blocks = n / part;
  for (int64_t b = 0; b < blocks; ++b) panel_stages(x + b * part * w, w, job.log2);
  if (job.core) core_columns<Out::raw>(*job.core, x, part * w, x, 0, part * w, static_cast<const C*>(nullptr), C(1));
  const C scale = static_cast<C>(job.scale);
  for (int64_t i = 0; i < n; ++i) {
    T* to = dst + i * job.dst_step;
    const C s = last ? signs[i] : C(1);
    for (int64_t c = 0; c < whole; c += W) store(to + c, load(x + i * w + c) * scale * s);
    if (rest > 0) store_n(to + whole, load(x + i * w + whole) * scale * s, rest);
  }
}

// ---- entry points ----

// Calls f(src, dst, signs, count) for the runs of rows along the innermost dimension that make up rows [begin, end).
template <class T, class C, class F>
void for_each_run(const Job& job, const T* src, T* dst, int64_t begin, int64_t end, int ndim, const F& f) {
  const C* signs = static_cast<const C*>(job.signs);
  while (begin < end) {
    int64_t rest = begin, s = 0, d = 0, g = 0, run = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const Dim& dim = job.dims[i];
      const int64_t at = rest % dim.size;
      rest /= dim.size;
      s += at * dim.src;
      d += at * dim.dst;
      g += at * dim.sign;
      if (i == ndim - 1) run = dim.size - at;
    }
    run = std::min(run, end - begin);
    f(src + s, dst + d, signs == nullptr ? nullptr : signs + g, run);
    begin += run;
  }
}

template <class C>
bool side_by_side(const Job& job) {
  if (job.contiguous() || job.ndim == 0) return false;
  const Dim& inner = job.dims[job.ndim - 1];
  return inner.src == 1 && inner.dst == 1 && inner.sign == 0 && inner.size * 2 > kLanes<C> && job.order > 1;
}

// Independent pieces of work in a job.
template <class C>
int64_t units(const Job& job) {
  if (!side_by_side<C>(job)) return job.rows;
  const int64_t inner = job.dims[job.ndim - 1].size, w = panel_width<C>(job);
  return job.rows / inner * ((inner + w - 1) / w);
}

template <class T>
void run(const Job& job, const void* src_data, void* dst_data, int64_t begin, int64_t end) {
  using C = compute_of<T>;
  const T* src = static_cast<const T*>(src_data);
  T* dst = static_cast<T*>(dst_data);
  if (side_by_side<C>(job)) {
    const int64_t inner = job.dims[job.ndim - 1].size, w = panel_width<C>(job), panels = (inner + w - 1) / w;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t c = u % panels * w;
      for_each_run<T, C>(job, src, dst, u / panels, u / panels + 1, job.ndim - 1,
                         [&](const T* s, T* d, const C* g, int64_t) { panel<T, C>(job, s + c, d + c, std::min(w, inner - c), g); });
    }
  } else {
    const Dim inner = job.ndim > 0 ? job.dims[job.ndim - 1] : Dim{1, 0, 0, 0};
    // Rows shorter than a vector are only loaded as they lie if they touch.
    const bool as_they_lie = job.contiguous() && (job.core != nullptr || job.order >= kLanes<C> ||
                                                  (inner.src == job.order && inner.dst == job.order));
    for_each_run<T, C>(job, src, dst, begin, end, job.ndim, [&](const T* s, T* d, const C* g, int64_t count) {
      if (as_they_lie) {
        contiguous_rows<T, C>(job, s, inner.src, d, inner.dst, count, g, inner.sign);
      } else {
        strided_rows<T, C>(job, s, inner.src, d, inner.dst, count, g, inner.sign);
      }
    });
  }
  Scratch::trim();
}

// One long contiguous row in two steps (see Split); `work` is the row's destination or memory of the compute type.
template <class T>
void run_blocks(const Job& job, const void* src, void* work, const void* signs, int64_t begin, int64_t end) {
  using C = compute_of<T>;
  split_blocks<T, C>(job, split_row<C>(job), static_cast<const T*>(src), static_cast<C*>(work), static_cast<const C*>(signs),
                     begin, end);
}
template <class T>
void run_columns(const Job& job, const void* work, void* dst, const void* signs, int64_t begin, int64_t end) {
  using C = compute_of<T>;
  split_columns<T, C>(job, split_row<C>(job), static_cast<const C*>(work), static_cast<T*>(dst), static_cast<const C*>(signs),
                      begin, end);
  Scratch::trim();
}
template <class T>
void split_of(const Job& job, int64_t* blocks, int64_t* width) {
  const Split split = split_row<compute_of<T>>(job);
  *blocks = split.blocks;
  *width = split.width;
}

template <class T>
constexpr hadamard::Kernel kernel_of() {
  return {&units<compute_of<T>>, &run<T>, &split_of<T>, &run_blocks<T>, &run_columns<T>};
}
inline constexpr hadamard::Kernel kKernels[] = {kernel_of<float>(), kernel_of<double>(), kernel_of<f16>(), kernel_of<bf16>()};
