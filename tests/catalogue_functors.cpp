// Runs generated functors (torchlin/catalogue/cpp_code.py) over arrays of doubles, for the tests.
#include "catalogue_primitives.h"
#include "kernels.inc"
#include TORCHLIN_ALL_SHARDS

namespace {

template <class K, class T, class P>
T apply(const T* x, const P& p) {
  if constexpr (K::inputs == 1) {
    return K::f(x[0], p);
  } else if constexpr (K::inputs == 2) {
    return K::f(x[0], x[1], p);
  } else {
    static_assert(K::inputs == 3);
    return K::f(x[0], x[1], x[2], p);
  }
}

template <class K>
void run(const double* const* x, int n, const SeededSlots& p, int input, double* f, double* d) {
  for (int i = 0; i < n; ++i) {
    double v[3];
    Dual u[3];
    for (int k = 0; k < K::inputs; ++k) {
      v[k] = x[k][i];
      u[k] = {x[k][i], k == input ? 1.0 : 0.0};
    }
    const Slots& constants = p;
    f[i] = apply<K>(v, constants);
    const Dual y = input >= 0 ? apply<K>(u, constants) : apply<K>(u, p);
    // the value of the dual number is held to be the function's own, bit for bit
    d[i] = y.v == f[i] || (y.v != y.v && f[i] != f[i]) ? y.d : -12345.0;
  }
}

}  // namespace

// Values and derivatives of kernel `id` at n points. The derivative is that by input `input`, or, if that is -1, by the element
// `seed` of the slots. Returns 0, or 1 if there is no such kernel.
extern "C" int run_kernel(int id, const double* const* x, int n, const double* values, const int* offset, const int* size,
                          int input, int seed, double* f, double* d) {
  const SeededSlots p{{values, offset, size}, seed};
  switch (id) {
#define CASE(K, label, number, n_inputs, n_slots)                                         \
  case number:                                                                            \
    static_assert(K::inputs == n_inputs && K::slots == n_slots, "the table differs: " label); \
    run<K>(x, n, p, input, f, d);                                                         \
    return 0;
    TORCHLIN_KERNELS(CASE)
  }
  return 1;
}
