// The machine's ceilings, as ops: loops that do one thing only, which the benchmarks time beside the real kernels.
#include <cstring>

#include "core/op.h"
#include "core/tensor.h"
#include "simd/cpu_isa.h"

#define TORCHLIN_KERNEL "bench/kernel_cpu.h"
#include "simd/foreach_isa.h"

namespace torchlin {
namespace {

// A dependent chain, one addition a cycle. Of two registers: CPUs fold additions of constants away while renaming.
int64_t bench_cycles(int64_t cycles) {
  int64_t sum = 0, step = 1;
  asm volatile("" : "+r"(step));
  for (int64_t i = 0; i < cycles; i += 16) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      sum += step;
      asm volatile("" : "+r"(sum));
    }
  }
  return sum;
}

// Arithmetic on `floats` numbers in registers, at the CPU level in use.
double bench_arithmetic(int64_t floats, std::string_view operation) {
  TORCHLIN_CHECK(operation == "add" || operation == "fma", "operation must be add or fma");
  const bool is_add = operation == "add";
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::avx512: return is_add ? avx512::additions(floats) : avx512::fmas(floats);
    case CpuIsa::avx2: return is_add ? avx2::additions(floats) : avx2::fmas(floats);
#endif
    default: return is_add ? baseline::additions(floats) : baseline::fmas(floats);
  }
}

// memcpy, over and over: many copies of a small tensor take the time of one call.
void bench_copy(const Tensor& target, const Tensor& source, int64_t times) {
  const size_t bytes = source.numel() * source.element_size();
  TORCHLIN_CHECK(target.is_contiguous() && source.is_contiguous(), "target and source must be contiguous");
  TORCHLIN_CHECK(target.numel() * target.element_size() == bytes, "target and source must have the same size");
  void* to = target.mutable_data_ptr();
  const void* from = source.const_data_ptr();
  for (int64_t i = 0; i < times; ++i) {
    std::memcpy(to, from, bytes);
    asm volatile("" ::: "memory");  // or only the last copy would be left
  }
}

}  // namespace
}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_bench_cycles(int cycles) -> int");
  m.def("_bench_arithmetic(int floats, str operation) -> float");
  m.def("_bench_copy(Tensor(a!) target, Tensor source, int times) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CompositeExplicitAutograd, m) {
  TORCHLIN_IMPL(m, "_bench_cycles", torchlin::bench_cycles);
  TORCHLIN_IMPL(m, "_bench_arithmetic", torchlin::bench_arithmetic);
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CPU, m) { TORCHLIN_IMPL(m, "_bench_copy", torchlin::bench_copy); }
