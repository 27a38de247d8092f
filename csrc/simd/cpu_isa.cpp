#include "simd/cpu_isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "core/op.h"

namespace torchlin {
namespace {

constexpr const char* kNames[kCpuIsaCount] = {"baseline", "avx2", "avx512"};

CpuIsa best_level() {
  for (int level = kCpuIsaCount - 1; level > 0; --level) {
    if (cpu_isa_supported(static_cast<CpuIsa>(level))) return static_cast<CpuIsa>(level);
  }
  return CpuIsa::baseline;
}

// Sets `level` from its name, or says why not.
std::string parse_level(std::string_view name, CpuIsa& level) {
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (name != kNames[i]) continue;
    level = static_cast<CpuIsa>(i);
    if (cpu_isa_supported(level)) return "";
    return "CPU level '" + std::string(name) + "' is not supported by this machine; it can run: " + cpu_isa_names();
  }
  return "unknown CPU level '" + std::string(name) + "'; this machine can run: " + cpu_isa_names();
}

CpuIsa initial_level() {
  CpuIsa level = best_level();
  const char* wanted = std::getenv("TORCHLIN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return level;
  const std::string problem = parse_level(wanted, level);
  if (problem.empty()) return level;
  level = best_level();
  std::fprintf(stderr, "torchlin: TORCHLIN_CPU_ISA: %s. Using %s.\n", problem.c_str(), cpu_isa_name(level));
  return level;
}

std::atomic<CpuIsa>& current_level() {
  static std::atomic<CpuIsa> level{initial_level()};
  return level;
}

std::string op_cpu_isa() { return cpu_isa_name(cpu_isa()); }

void op_set_cpu_isa(std::string name) {
  const std::string problem = set_cpu_isa(name);
  TORCHLIN_CHECK(problem.empty(), problem);
}

}  // namespace

CpuIsa cpu_isa() { return current_level().load(std::memory_order_relaxed); }

bool cpu_isa_supported(CpuIsa level) {
#if defined(__x86_64__)
  // These ask the CPU and whether the OS saves the registers.
  switch (level) {
    case CpuIsa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             cpu_isa_supported(CpuIsa::avx2);
    case CpuIsa::avx2:
      // Every CPU with AVX2 and FMA also has F16C; older compilers cannot ask for it by name.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case CpuIsa::baseline: return true;
  }
#endif
  return level == CpuIsa::baseline;
}

const char* cpu_isa_name(CpuIsa level) { return kNames[static_cast<int>(level)]; }

std::string cpu_isa_names() {
  std::string names;
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (!cpu_isa_supported(static_cast<CpuIsa>(i))) continue;
    if (!names.empty()) names += ',';
    names += kNames[i];
  }
  return names;
}

std::string set_cpu_isa(std::string_view name) {
  CpuIsa level{};
  const std::string problem = parse_level(name, level);
  if (problem.empty()) current_level().store(level, std::memory_order_relaxed);
  return problem;
}

}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_cpu_isa() -> str");
  m.def("_cpu_isa_names() -> str");
  m.def("_set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CompositeExplicitAutograd, m) {
  TORCHLIN_IMPL(m, "_cpu_isa", torchlin::op_cpu_isa);
  TORCHLIN_IMPL(m, "_cpu_isa_names", torchlin::cpu_isa_names);
  TORCHLIN_IMPL(m, "_set_cpu_isa", torchlin::op_set_cpu_isa);
}
