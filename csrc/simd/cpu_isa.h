// Which copy of a CPU kernel runs. Every kernel is compiled once per level (foreach_isa.h); the level is chosen once, at
// first use: the best one this CPU and OS support, or what TORCHLIN_CPU_ISA says.
#pragma once

#include <string>
#include <string_view>

namespace torchlin {

enum class CpuIsa : int { baseline, avx2, avx512 };
inline constexpr int kCpuIsaCount = 3;

CpuIsa cpu_isa();
bool cpu_isa_supported(CpuIsa level);
const char* cpu_isa_name(CpuIsa level);
std::string cpu_isa_names();  // the levels this machine can run, comma-separated

// Makes `name` the level in use. Returns what is wrong with it, or "" when it was taken.
std::string set_cpu_isa(std::string_view name);

}  // namespace torchlin
