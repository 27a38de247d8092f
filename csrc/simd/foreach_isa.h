// Compiles one kernel body once per CPU level, into namespaces torchlin::baseline, ::avx2 and ::avx512:
//
//   #define TORCHLIN_KERNEL "family/kernel_cpu.h"
//   #include "simd/foreach_isa.h"
//
// Everything else must be included before: what is included inside a level would be compiled for that level, and an inline
// function shared with other files could then reach a CPU that lacks it. So this file includes all that simd.h needs first.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd/half.h"

#define TORCHLIN_ISA baseline
#define TORCHLIN_ISA_BYTES 16
namespace torchlin::baseline {
#include "simd/simd.h"
#include TORCHLIN_KERNEL
}  // namespace torchlin::baseline
#undef TORCHLIN_ISA
#undef TORCHLIN_ISA_BYTES

#if defined(__x86_64__)

#define TORCHLIN_ISA avx2
#define TORCHLIN_ISA_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace torchlin::avx2 {
#include "simd/simd.h"
#include TORCHLIN_KERNEL
}  // namespace torchlin::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef TORCHLIN_ISA
#undef TORCHLIN_ISA_BYTES

#define TORCHLIN_ISA avx512
#define TORCHLIN_ISA_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
namespace torchlin::avx512 {
#include "simd/simd.h"
#include TORCHLIN_KERNEL
}  // namespace torchlin::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef TORCHLIN_ISA
#undef TORCHLIN_ISA_BYTES

#endif  // __x86_64__

#undef TORCHLIN_KERNEL
