// The CUDA kernels of one functor (catalogue/cpp_code.py): forward, backward, and backward with the gradients of slots.
//
// An element type is a number that the kernel is told: a branch around the loads and stores, where a template would make three
// kernels of each functor. A thread has eight elements. Where the innermost dimension is contiguous and aligned, they lie side by
// side and move in 16-byte accesses; else they lie a block apart, so that neighbouring threads read neighbouring elements. A
// functor is expanded for four elements at a time, in a loop that turns the registers instead of indexing them: that, too, is
// for the size of the code.
#pragma once

#include "gpu/vec.cuh"

#include "gpu/scalar.cuh"

#if defined(TORCHLIN_FUNCTOR)
#undef TORCHLIN_FUNCTOR
#endif
#define TORCHLIN_FUNCTOR TORCHLIN_INLINE

namespace torchlin::activation {

#include "gpu/elementary.cuh"

#include "simd/dual.h"

namespace tl {
#include "activation/reductions.h"
}

enum Type : int { kFloat32, kFloat16, kBFloat16 };

inline constexpr int kThreads = 128, kPerThread = 8, kTile = kThreads * kPerThread, kMaxDims = 12, kMaxSlots = 32;
// Elements at a time; one where a functor has loops of its own.
template <class K>
inline constexpr int step_of = K::vectors == 0 ? 4 : 1;

// n / divisor for n < 2^31, without a division: floor(2 n m / 2^(32 + shift)), m = ceil(2^(31 + shift) / divisor).
struct Divider {
  uint32_t divisor, factor, shift;

  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return gpu::multiply_high(n << 1, factor) >> shift; }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const { return n - divide(n) * divisor; }
};

struct Operand {
  char* data;  // null: not wanted
  int64_t stride[kMaxDims];
};

// Element e, in the order of the dimensions, the innermost first. Fewer than 2^31 elements: the host cuts what is larger.
struct Arguments {
  Operand in[3], grad, out[3];
  const float* slots;  // (rows, channels)
  Divider dims[kMaxDims];
  Divider inner, channels;  // the channel of e is e / inner % channels
  uint32_t total;
  int ndim;
  Type type;
  bool vectors;      // 16-byte accesses of eight elements side by side
  bool interleaved;  // the first two inputs lie in one tensor in turn, as do their gradients
  int first_row[kMaxSlots], length[kMaxSlots];
};

// ---- moving elements ----

TORCHLIN_INLINE const char* address(const Operand& x, int64_t offset, Type type) {
  return x.data + (offset << (type == kFloat32 ? 2 : 1));
}
TORCHLIN_INLINE char* address_of_output(const Operand& x, int64_t offset, Type type) {
  return x.data + (offset << (type == kFloat32 ? 2 : 1));
}

struct alignas(16) Words {
  uint32_t w[4];
};

TORCHLIN_INLINE void load_eight(const char* p, Type type, float (&v)[kPerThread]) {
  const Words a = gpu::load_vec<Words>(p);
  if (type == kFloat32) {
    const Words b = gpu::load_vec<Words>(p + 16);
    gpu::static_for<4>([&](auto i) {
      v[i.value] = gpu::bit_cast<float>(a.w[i.value]);
      v[4 + i.value] = gpu::bit_cast<float>(b.w[i.value]);
    });
  } else if (type == kBFloat16) {
    gpu::static_for<4>([&](auto i) {
      v[2 * i.value] = gpu::first_bfloat16(a.w[i.value]);
      v[2 * i.value + 1] = gpu::second_bfloat16(a.w[i.value]);
    });
  } else {
    gpu::static_for<4>([&](auto i) {
      v[2 * i.value] = gpu::first_half(a.w[i.value]);
      v[2 * i.value + 1] = gpu::second_half(a.w[i.value]);
    });
  }
}

TORCHLIN_INLINE void store_eight(char* p, Type type, const float (&v)[kPerThread]) {
  Words a;
  if (type == kFloat32) {
    Words b;
    gpu::static_for<4>([&](auto i) {
      a.w[i.value] = gpu::bit_cast<uint32_t>(v[i.value]);
      b.w[i.value] = gpu::bit_cast<uint32_t>(v[4 + i.value]);
    });
    gpu::store_vec(p + 16, b);
  } else if (type == kBFloat16) {
    gpu::static_for<4>([&](auto i) { a.w[i.value] = gpu::pack_bfloat16(v[2 * i.value], v[2 * i.value + 1]); });
  } else {
    gpu::static_for<4>([&](auto i) { a.w[i.value] = gpu::pack_half(v[2 * i.value], v[2 * i.value + 1]); });
  }
  gpu::store_vec(p, a);
}

TORCHLIN_INLINE float load_one(const char* p, Type type) {
  if (type == kFloat32) return *reinterpret_cast<const float*>(p);
  const uint32_t word = *reinterpret_cast<const uint16_t*>(p);
  return type == kBFloat16 ? gpu::first_bfloat16(word) : gpu::first_half(word);
}
TORCHLIN_INLINE void store_one(char* p, Type type, float v) {
  if (type == kFloat32) {
    *reinterpret_cast<float*>(p) = v;
  } else {
    const uint32_t word = type == kBFloat16 ? gpu::pack_bfloat16(v, v) : gpu::pack_half(v, v);
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(word);
  }
}

// What was at place k is at place k - By; the last places keep what they had.
template <int By>
TORCHLIN_INLINE void turn(float (&v)[kPerThread]) {
  gpu::static_for<kPerThread - By>([&](auto k) { v[k.value] = v[k.value + By]; });
}

// The operands of a kernel, and where an element lies in each.
template <int Inputs, bool Gradient>
struct Operands {
  static constexpr int kIn = Inputs + Gradient, kOut = Gradient ? Inputs : 1;
  struct Place {
    int64_t in[kIn], out[kOut];
  };

  TORCHLIN_INLINE static const Operand& in(const Arguments& a, int i) { return i < Inputs ? a.in[i] : a.grad; }

  TORCHLIN_INLINE static Place locate(const Arguments& a, uint32_t element) {
    Place at{};
    const auto add = [&](int d, uint32_t index) {
      TORCHLIN_UNROLL
      for (int i = 0; i < kIn; ++i) at.in[i] += index * in(a, i).stride[d];
      TORCHLIN_UNROLL
      for (int i = 0; i < kOut; ++i) at.out[i] += index * a.out[i].stride[d];
    };
    const int last = a.ndim - 1;
    TORCHLIN_NO_UNROLL
    for (int d = 0; d < last; ++d) {
      const uint32_t rest = a.dims[d].divide(element);
      add(d, element - rest * a.dims[d].divisor);
      element = rest;
    }
    add(last, element);
    return at;
  }

  TORCHLIN_INLINE static void load(const Arguments& a, const Place& at, float (&v)[kIn][kPerThread]) {
    if constexpr (Inputs > 1) {
      if (a.interleaved) {
        const bool swapped = a.in[1].data < a.in[0].data;
        const char* p = address(a.in[swapped], at.in[0], a.type);
        float lower[kPerThread], upper[kPerThread];
        load_eight(p, a.type, lower);
        load_eight(p + (a.type == kFloat32 ? 32 : 16), a.type, upper);
        gpu::static_for<4>([&](auto k) {
          v[0][k.value] = lower[2 * k.value + 0], v[0][4 + k.value] = upper[2 * k.value + 0];
          v[1][k.value] = lower[2 * k.value + 1], v[1][4 + k.value] = upper[2 * k.value + 1];
        });
        if (swapped) exchange(v[0], v[1]);
      } else {
        load_eight(address(a.in[0], at.in[0], a.type), a.type, v[0]);
        load_eight(address(a.in[1], at.in[1], a.type), a.type, v[1]);
      }
      TORCHLIN_UNROLL
      for (int i = 2; i < kIn; ++i) load_eight(address(in(a, i), at.in[i], a.type), a.type, v[i]);
    } else {
      TORCHLIN_UNROLL
      for (int i = 0; i < kIn; ++i) load_eight(address(in(a, i), at.in[i], a.type), a.type, v[i]);
    }
  }

  TORCHLIN_INLINE static void store(const Arguments& a, const Place& at, float (&v)[kIn][kPerThread]) {
    if constexpr (kOut > 1) {
      if (a.interleaved) {
        if (a.out[0].data != nullptr) {
          const bool swapped = a.out[1].data < a.out[0].data;
          char* p = address_of_output(a.out[swapped], at.out[0], a.type);
          if (swapped) exchange(v[0], v[1]);
          float lower[kPerThread], upper[kPerThread];
          gpu::static_for<4>([&](auto k) {
            lower[2 * k.value] = v[0][k.value], lower[2 * k.value + 1] = v[1][k.value];
            upper[2 * k.value] = v[0][4 + k.value], upper[2 * k.value + 1] = v[1][4 + k.value];
          });
          store_eight(p, a.type, lower);
          store_eight(p + (a.type == kFloat32 ? 32 : 16), a.type, upper);
        }
        if constexpr (kOut > 2) {
          if (a.out[2].data != nullptr) store_eight(address_of_output(a.out[2], at.out[2], a.type), a.type, v[2]);
        }
        return;
      }
    }
    TORCHLIN_UNROLL
    for (int i = 0; i < kOut; ++i) {
      if (!Gradient || a.out[i].data != nullptr) store_eight(address_of_output(a.out[i], at.out[i], a.type), a.type, v[i]);
    }
  }

  TORCHLIN_INLINE static void exchange(float (&u)[kPerThread], float (&v)[kPerThread]) {
    gpu::static_for<kPerThread>([&](auto k) {
      const float kept = u[k.value];
      u[k.value] = v[k.value];
      v[k.value] = kept;
    });
  }

  // One by one, each entering behind the others; element(k) is its number, or `none`.
  static constexpr uint32_t none = 0xffffffffu;
  template <class Element>
  TORCHLIN_INLINE static void gather(const Arguments& a, Element element, float (&v)[kIn][kPerThread]) {
    TORCHLIN_NO_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      const uint32_t e = element(k);
      Place at{};
      if (e != none) at = locate(a, e);
      TORCHLIN_UNROLL
      for (int i = 0; i < kIn; ++i) {
        turn<1>(v[i]);
        v[i][kPerThread - 1] = e != none ? load_one(address(in(a, i), at.in[i], a.type), a.type) : 0.0f;
      }
    }
  }
  template <class Element>
  TORCHLIN_INLINE static void scatter(const Arguments& a, Element element, float (&v)[kIn][kPerThread]) {
    TORCHLIN_NO_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      const uint32_t e = element(k);
      if (e != none) {
        const Place at = locate(a, e);
        TORCHLIN_UNROLL
        for (int i = 0; i < kOut; ++i) {
          if (!Gradient || a.out[i].data != nullptr) {
            store_one(address_of_output(a.out[i], at.out[i], a.type), a.type, v[i][0]);
          }
        }
      }
      TORCHLIN_UNROLL
      for (int i = 0; i < kOut; ++i) turn<1>(v[i]);
    }
  }
};

// ---- slots ----

// Slots as constants: numbers in registers, coefficient vectors in memory.
template <class K>
struct Slots {
  __host__ __device__ static constexpr bool is_vector(int i) { return K::vectors >> i & 1; }
  const Arguments& a;
  const float* of_channel;
  float number[K::slots > 0 ? K::slots : 1];

  TORCHLIN_INLINE explicit Slots(const Arguments& arguments) : a(arguments), of_channel(arguments.slots) { read(); }
  TORCHLIN_INLINE void read() {
    gpu::static_for<K::slots>([&](auto i) {
      if constexpr (!is_vector(i.value)) number[i.value] = gpu::load_constant(row(a.first_row[i.value]));
    });
  }
  TORCHLIN_INLINE const float* row(int r) const { return of_channel + static_cast<int64_t>(r) * a.channels.divisor; }
  TORCHLIN_INLINE void select(uint32_t channel) {
    of_channel = a.slots + channel;
    read();
  }
  TORCHLIN_INLINE void select_for(uint32_t element) {
    if constexpr (K::slots > 0) {
      if (a.channels.divisor > 1) select(a.channels.remainder(a.inner.divide(element)));
    }
  }
  TORCHLIN_INLINE float value(int i, int j) const {
    return K::vectors >> i & 1 ? gpu::load_constant(row(a.first_row[i] + j)) : number[i];
  }
  template <class T>
  TORCHLIN_INLINE float arg(int i, int j) const {
    return value(i, j);
  }
  TORCHLIN_INLINE int length(int i) const { return a.length[i]; }
};

template <class T, int i, int N>
TORCHLIN_INLINE auto input(const float (&v)[N][kPerThread], int k) {
  if constexpr (tl::is_dual<T>) return tl::Dual<float, T::variables, 1u << i>::variable(v[i][k], i);
  else return v[i][k];
}

// f of element k; T says whether with derivatives.
template <class T, class K, int N, class P>
TORCHLIN_INLINE T apply(const float (&v)[N][kPerThread], int k, const P& p) {
  if constexpr (K::inputs == 1) return K::f(input<T, 0>(v, k), p);
  else if constexpr (K::inputs == 2) return K::f(input<T, 0>(v, k), input<T, 1>(v, k), p);
  else return K::f(input<T, 0>(v, k), input<T, 1>(v, k), input<T, 2>(v, k), p);
}

// ---- forward, and backward by the inputs ----

template <class K, bool Gradient>
TORCHLIN_INLINE void run(const Arguments& a) {
  using Of = Operands<K::inputs, Gradient>;
  using T = std::conditional_t<Gradient, tl::Dual<float, K::inputs>, float>;
  constexpr int kStep = step_of<K>;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t first = a.vectors ? thread * kPerThread : blockIdx.x * kTile + threadIdx.x;
  if (first >= a.total) return;
  const uint32_t apart = a.vectors ? 1 : kThreads;
  const bool whole = a.vectors && first + kPerThread <= a.total;
  const auto element = [&](int k) {
    const uint32_t e = first + k * apart;
    return e < a.total ? e : Of::none;
  };

  Slots<K> p(a);  // first, so that its loads do not wait for the others
  float v[Of::kIn][kPerThread] = {};
  typename Of::Place at{};
  if (whole) {
    at = Of::locate(a, first);
    Of::load(a, at, v);
  } else {
    Of::gather(a, element, v);
  }
  TORCHLIN_NO_UNROLL
  for (int k = 0; k < kPerThread; k += kStep) {
    float out[Of::kOut][kStep];
    gpu::static_for<kStep>([&](auto u) {
      p.select_for(first + (k + u.value) * apart);
      const T y = apply<T, K>(v, u.value, p);
      gpu::static_for<Of::kOut>([&](auto i) {
        if constexpr (Gradient) out[i.value][u.value] = v[K::inputs][u.value] * y.d[i.value];
        else out[i.value][u.value] = y;
      });
    });
    gpu::static_for<Of::kIn>([&](auto i) { turn<kStep>(v[i.value]); });
    gpu::static_for<Of::kOut>([&](auto i) {
      gpu::static_for<kStep>([&](auto u) { v[i.value][kPerThread - kStep + u.value] = out[i.value][u.value]; });
    });
  }
  if (whole) Of::store(a, at, v);
  else Of::scatter(a, element, v);
}

// ---- backward by the inputs and the slots ----

// How the work is divided depends on the sizes alone, and sums are taken in a fixed order: the same bits on every device.
// A block adds up what belongs to one channel (or, where rows of a channel are short, to 32 columns of channels times the
// inner dimensions), one part of it: block (x, y) takes part y of channel or columns x. A thread's sums lie in shared memory,
// a row of the block for each row of the slots from first_row on.
struct SumArguments {
  Arguments of;
  double* sums;  // (parts, rows, width)
  int64_t width;  // channels or columns
  int rows, first_row, window;
  bool by_columns;
  uint32_t columns;  // channels times inner
  uint32_t part;     // elements of a channel, or rows of columns
  uint32_t end;      // of all parts
  uint32_t skip;     // from the end of one row of a channel to the beginning of its next
};

inline constexpr int kColumns = 32, kRowsAtOnce = kThreads / kColumns;

// Variables of the run that gives derivatives: inputs, slots of one value, reductions.
template <class K>
__host__ __device__ constexpr int variable_of_slot(int i) {
  int at = K::inputs;
  for (int k = 0; k < i; ++k) at += !(K::vectors >> k & 1);
  return at;
}

// Each variable is a dual number that depends on itself alone.
template <class K>
struct VariableSlots : Slots<K> {
  static constexpr int variables = variable_of_slot<K>(K::slots) + K::reductions;
  template <int i>
  using Of = tl::Dual<float, variables, 1u << i>;
  using Dual = tl::Dual<float, variables>;
  using Slots<K>::Slots;

  template <int i>
  TORCHLIN_INLINE auto slot() const {
    constexpr int at = variable_of_slot<K>(i);
    return Of<at>::variable(this->value(i, 0), at);
  }
  template <int i>
  TORCHLIN_INLINE float element(int j) const {
    return this->value(i, j);
  }
  template <int k, class Total>
  TORCHLIN_INLINE auto mark(Total total) const {
    constexpr int at = variables - K::reductions + k;
    tl::common<Total, Of<at>> marked(total);
    marked.d[at] = 1.0f;
    return marked;
  }
};

template <class K>
struct CollectingSlots : Slots<K> {
  using Dual = tl::Dual<float, K::slots>;
  const SumArguments& s;
  gpu::shared_ptr<float> mine;
  float weight[K::reductions > 0 ? K::reductions : 1];  // d loss/d R_k

  TORCHLIN_INLINE CollectingSlots(const SumArguments& arguments, gpu::shared_ptr<float> column)
      : Slots<K>(arguments.of), s(arguments), mine(column) {}

  TORCHLIN_INLINE void add(int i, int j, float g) const {
    const int row = this->a.first_row[i] + j - s.first_row;
    if (static_cast<uint32_t>(row) < static_cast<uint32_t>(s.window)) mine[row * kThreads] += g;
  }
  template <int i>
  TORCHLIN_INLINE float slot() const {
    return this->value(i, 0);
  }
  template <int i>
  TORCHLIN_INLINE Dual element(int j) const {
    return Dual::variable(this->value(i, j), i);
  }
  template <int k, int... slots, class Term>
  TORCHLIN_INLINE float collect(Term term, int j) const {
    (add(slots, j, weight[k] * term.d[slots]), ...);
    return term.v;
  }
  template <int k, int i>
  TORCHLIN_INLINE void collect_basis(float b, int j) const {
    add(i, j, weight[k] * b);
  }
};

namespace tl {
template <class K>
inline constexpr Reductions reductions_of<VariableSlots<K>> = Reductions::mark;
template <class K>
inline constexpr Reductions reductions_of<CollectingSlots<K>> = Reductions::collect;
template <class K>
inline constexpr bool typed_slots<VariableSlots<K>> = true;
template <class K>
inline constexpr bool typed_slots<CollectingSlots<K>> = true;
}  // namespace tl

template <class K>
TORCHLIN_INLINE void run_with_sums(const SumArguments& s) {
  using Of = Operands<K::inputs, true>;
  using P = VariableSlots<K>;
  const Arguments& a = s.of;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t column = blockIdx.x * kColumns + thread % kColumns;
  const uint32_t channel = s.by_columns ? a.inner.divide(column) : blockIdx.x;
  const bool exists = !s.by_columns || column < s.columns;
  const auto sums = gpu::dynamic_shared<float>();
  const auto mine = sums + thread;
  TORCHLIN_NO_UNROLL
  for (int r = 0; r < s.window; ++r) mine[r * kThreads] = 0.0f;

  P p(a);
  CollectingSlots<K> q(s, mine);
  p.select(exists ? channel : 0);
  if constexpr (K::reductions > 0) q.select(exists ? channel : 0);
  float total[K::slots] = {};
  const uint32_t begin = blockIdx.y * s.part, end = s.end - begin < s.part ? s.end : begin + s.part;
  const uint32_t lane = s.by_columns ? thread / kColumns : a.vectors ? thread * kPerThread : thread;
  const uint32_t apart = s.by_columns ? kRowsAtOnce : a.vectors ? 1 : kThreads;
  const uint32_t tile = s.by_columns ? kRowsAtOnce * kPerThread : kTile;
  TORCHLIN_NO_UNROLL
  for (uint32_t from = begin; exists && from < end; from += tile) {
    const uint32_t first = from + lane;
    const bool whole = a.vectors && first + kPerThread <= end;
    const auto place = [&](uint32_t m) {
      return s.by_columns ? m * s.columns + column : m + a.inner.divide(m) * s.skip + channel * a.inner.divisor;
    };
    const auto element = [&](int k) {
      const uint32_t m = first + k * apart;
      return m < end ? place(m) : Of::none;
    };
    float v[Of::kIn][kPerThread] = {};
    typename Of::Place at{};
    if (whole) {
      at = Of::locate(a, place(first));
      Of::load(a, at, v);
    } else {
      Of::gather(a, element, v);
    }
    TORCHLIN_NO_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      float out[K::inputs] = {};
      if (first + k * apart < end) {
        const typename P::Dual y = apply<typename P::Dual, K>(v, 0, p);
        const float g = v[K::inputs][0];
        gpu::static_for<K::inputs>([&](auto i) { out[i.value] = g * y.d[i.value]; });
        gpu::static_for<K::slots>([&](auto i) {
          if constexpr (!Slots<K>::is_vector(i.value)) total[i.value] += g * y.d[variable_of_slot<K>(i.value)];
        });
        if constexpr (K::reductions > 0) {
          gpu::static_for<K::reductions>(
              [&](auto r) { q.weight[r.value] = g * y.d[P::variables - K::reductions + r.value]; });
          apply<float, K>(v, 0, q);
        }
      }
      gpu::static_for<Of::kIn>([&](auto i) { turn<1>(v[i.value]); });
      gpu::static_for<K::inputs>([&](auto i) { v[i.value][kPerThread - 1] = out[i.value]; });
    }
    if (whole) Of::store(a, at, v);
    else Of::scatter(a, element, v);
  }
  gpu::static_for<K::slots>([&](auto i) {
    if constexpr (!Slots<K>::is_vector(i.value)) q.add(i.value, 0, total[i.value]);
  });
  __syncthreads();

  const int warp = thread / 32, in_warp = thread % 32;
  TORCHLIN_NO_UNROLL
  for (int r = warp; r < s.window; r += kThreads / 32) {
    double sum = 0.0;
    TORCHLIN_NO_UNROLL
    for (int i = 0; i < kThreads / 32; ++i) sum += sums[r * kThreads + i * 32 + in_warp];
    const int64_t row = static_cast<int64_t>(blockIdx.y) * s.rows + s.first_row + r;
    if (s.by_columns) {
      if (exists) s.sums[row * s.width + column] = sum;
    } else {
      TORCHLIN_NO_UNROLL
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (in_warp == 0) s.sums[row * s.width + blockIdx.x] = sum;
    }
  }
}

// out[r, c] = sum of sums[part, r, c * inner + i] over parts and i < inner: a warp for each.
struct FoldArguments {
  const double* sums;
  float* out;
  int64_t count;  // rows times channels
  uint32_t inner, parts;
};

TORCHLIN_INLINE void fold(const FoldArguments& f) {
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  double sum = 0.0;
  if (wanted < f.count) {
    TORCHLIN_NO_UNROLL
    for (uint32_t k = lane; k < f.parts * f.inner; k += 32) {
      const uint32_t part = k / f.inner, i = k - part * f.inner;
      sum += f.sums[(part * f.count + wanted) * f.inner + i];
    }
  }
  TORCHLIN_NO_UNROLL
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (wanted < f.count && lane == 0) f.out[wanted] = static_cast<float>(sum);
}

// ---- kernels ----

template <class K>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ Arguments a) {
  run<K, false>(a);
}
template <class K>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Arguments a) {
  run<K, true>(a);
}
// Told how many blocks are to fit, ptxas does not spill to make more of them fit.
template <class K>
__global__ void __launch_bounds__(kThreads, 6) backward_slots(const __grid_constant__ SumArguments s) {
  run_with_sums<K>(s);
}

// A functor's kernels, as the host holds them.
struct Functor {
  int id, inputs, slots;
  unsigned vectors;  // bit i: slot i is a coefficient vector
  void (*forward)(Arguments);
  void (*backward)(Arguments);
  void (*backward_slots)(SumArguments);  // null without slots
};
struct Table {
  const Functor* functors;
  int count;
};

template <class K>
constexpr auto slots_kernel() -> void (*)(SumArguments) {
  if constexpr (K::slots > 0) return backward_slots<K>;
  else return nullptr;
}
#define TORCHLIN_FUNCTOR_ROW(K) \
  {K::id, K::inputs, K::slots, K::vectors, forward<K>, backward<K>, slots_kernel<K>()},

}  // namespace torchlin::activation
