// The family's kernels at one CPU level (simd/foreach_isa.h).
#include "grid/codes_cpu.h"
#include "grid/nearest_cpu.h"
#include "grid/encode_cpu.h"
#include "grid/decode_cpu.h"
#include "grid/linear_cpu.h"

inline constexpr grid::Kernel kKernel = {
    &encode_rows, &decode_points, &pack_rows, &unpack_rows, &dequantize_rows,
    {linear_kernel_of<float>(), linear_kernel_of<f16>(), linear_kernel_of<bf16>()},
};
