// Small kernels, right and wrong, that show what the emulator does and catches (tests/test_simt.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "gpu/cp_async.cuh"
#include "gpu/mma.cuh"

namespace py = pybind11;
using namespace torchlin::gpu;

namespace {

struct Arguments {
  const float* x;
  float* y;
  int n;
};

__global__ void reverse_block(Arguments a) {
  const auto s = dynamic_shared<float>();
  const int t = threadIdx.x;
  s[t] = a.x[blockIdx.x * blockDim.x + t];
  __syncthreads();
  a.y[blockIdx.x * blockDim.x + t] = s[blockDim.x - 1 - t];
}

__global__ void reverse_without_barrier(Arguments a) {
  const auto s = dynamic_shared<float>();
  const int t = threadIdx.x;
  s[t] = a.x[t];
  a.y[t] = s[blockDim.x - 1 - t];
}

// Each warp turns its own 32 words around: __syncwarp is enough.
__global__ void reverse_warp(Arguments a) {
  const auto s = dynamic_shared<float>();
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    s[t] = a.x[t];
    __syncwarp();
    a.y[t] = s[t ^ 31];
    __syncwarp();
  }
}

__global__ void reverse_across_warps_with_syncwarp(Arguments a) {
  const auto s = dynamic_shared<float>();
  const int t = threadIdx.x;
  s[t] = a.x[t];
  __syncwarp();
  a.y[t] = s[blockDim.x - 1 - t];
}

// Global memory is not watched: what a race leaves there depends on the schedule, as on a device.
__global__ void last_writer_wins(Arguments a) { a.y[0] = static_cast<float>(threadIdx.x); }

__global__ void warp_sum(Arguments a) {
  float v = a.x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  a.y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

__global__ void shuffles(Arguments a) {
  const float v = a.x[threadIdx.x];
  a.y[threadIdx.x] = __shfl_sync(0xffffffffu, v, 5);
  a.y[32 + threadIdx.x] = __shfl_up_sync(0xffffffffu, v, 3);
  a.y[64 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, 3, 16);
  a.y[96 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 9);
}

__global__ void votes(Arguments a) {
  const int p = a.x[threadIdx.x] > 0;
  a.y[0] = static_cast<float>(__ballot_sync(0xffffffffu, p) & 0xffffff);
  a.y[1] = static_cast<float>(__any_sync(0xffffffffu, p));
  a.y[2] = static_cast<float>(__all_sync(0xffffffffu, p));
  a.y[3] = static_cast<float>(__syncthreads_or(p));
  a.y[4] = static_cast<float>(__syncthreads_and(p));
  a.y[5] = static_cast<float>(__syncthreads_count(p));
}

__global__ void barrier_in_branch(Arguments) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exit_before_barrier(Arguments a) {
  if (static_cast<int>(threadIdx.x) >= a.n) return;
  __syncthreads();
}

__global__ void shuffle_in_branch(Arguments a) {
  float v = a.x[threadIdx.x];
  if (threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 2);
  a.y[threadIdx.x] = v;
}

__global__ void shuffle_of_absent_lane(Arguments a) {
  if (threadIdx.x < 16) a.y[threadIdx.x] = __shfl_sync(0xffffu, a.x[threadIdx.x], 20);
}

__global__ void mask_without_caller(Arguments) { __syncwarp(0xfffffffeu); }

__global__ void shuffle_against_barrier(Arguments a) {
  if (threadIdx.x < 32) {
    a.y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, a.x[threadIdx.x], threadIdx.x == 7 ? 1 : 1);
    __syncthreads();
  } else if (threadIdx.x == 40) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void write_past_end(Arguments a) { dynamic_shared<float>()[threadIdx.x + a.n] = 1; }
__global__ void read_before_start(Arguments a) { a.y[0] = dynamic_shared<float>()[-1]; }
__global__ void read_unwritten(Arguments a) { a.y[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }
__global__ void vector_misaligned(Arguments a) {
  const auto s = dynamic_shared<float>();
  store_shared(s + 2, Vec<float, 4>{{1, 2, 3, 4}});
  a.y[0] = s[2];
}

// The raw bytes behind the checks: a NaN until someone writes.
__global__ void poison(Arguments a) {
  for (int i = 0; i < a.n; ++i) std::memcpy(a.y + i, simt::detail::machine().shared + 4 * i, 4);
}

__global__ void copy_async(Arguments a) {
  const auto s = dynamic_shared<float>();
  cp_async_16(shared_cast<uint32_t>(s + 4 * threadIdx.x), a.x + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) a.y[4 * threadIdx.x + i] = s[4 * (blockDim.x - 1 - threadIdx.x) + i];
}

__global__ void copy_async_unawaited(Arguments a) {
  const auto s = dynamic_shared<float>();
  cp_async_16(shared_cast<uint32_t>(s + 4 * threadIdx.x), a.x + 4 * threadIdx.x);
  cp_async_commit();
  a.y[threadIdx.x] = s[4 * threadIdx.x];
}

// y (16 x 8) = A (16 x 16) B (16 x 8) with integers small enough for both types; x holds A, then B.
template <class T>
__global__ void matrix(Arguments a) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto pair = [](float lo, float hi) {
    return bits_as<uint16_t>(T(lo)) | static_cast<uint32_t>(bits_as<uint16_t>(T(hi))) << 16;
  };
  const float *A = a.x, *B = a.x + 256;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const float* row = A + 16 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
    fa[i] = pair(row[0], row[1]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = pair(B[8 * (2 * t + 8 * i) + g], B[8 * (2 * t + 8 * i + 1) + g]);
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(d, fa, fb);
  for (int i = 0; i < 4; ++i) a.y[8 * (g + i / 2 * 8) + 2 * t + i % 2] = d[i];
}

__global__ void count_up(Arguments a) { atomicAdd(a.y, 1.0f); }
__global__ void order_of_threads(Arguments a) {
  a.y[1 + static_cast<int>(atomicAdd(a.y, 1.0f))] = static_cast<float>(blockIdx.x * blockDim.x + threadIdx.x);
}

const std::map<std::string, void (*)(Arguments)> kKernels = {
    {"reverse_block", reverse_block},
    {"reverse_without_barrier", reverse_without_barrier},
    {"reverse_warp", reverse_warp},
    {"reverse_across_warps_with_syncwarp", reverse_across_warps_with_syncwarp},
    {"last_writer_wins", last_writer_wins},
    {"warp_sum", warp_sum},
    {"shuffles", shuffles},
    {"votes", votes},
    {"barrier_in_branch", barrier_in_branch},
    {"exit_before_barrier", exit_before_barrier},
    {"shuffle_in_branch", shuffle_in_branch},
    {"shuffle_of_absent_lane", shuffle_of_absent_lane},
    {"mask_without_caller", mask_without_caller},
    {"shuffle_against_barrier", shuffle_against_barrier},
    {"write_past_end", write_past_end},
    {"read_before_start", read_before_start},
    {"read_unwritten", read_unwritten},
    {"vector_misaligned", vector_misaligned},
    {"poison", poison},
    {"copy_async", copy_async},
    {"copy_async_unawaited", copy_async_unawaited},
    {"matrix_float16", matrix<Half>},
    {"matrix_bfloat16", matrix<BFloat16>},
    {"count_up", count_up},
    {"order_of_threads", order_of_threads},
};

py::array_t<float> run(const std::string& kernel, py::array_t<float> x, int outputs, unsigned grid,
                       unsigned block, size_t shared_bytes, int n, uint64_t seed) {
  py::array_t<float> y(outputs);
  std::fill(y.mutable_data(), y.mutable_data() + outputs, 0.0f);
  simt::set_seed(seed);
  simt::launch(kKernels.at(kernel), simt::dim3(grid), simt::dim3(block), shared_bytes,
               Arguments{x.data(), y.mutable_data(), n});
  return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("run", &run, py::arg("kernel"), py::arg("x"), py::arg("outputs"), py::arg("grid") = 1,
        py::arg("block") = 32, py::arg("shared_bytes") = 0, py::arg("n") = 0, py::arg("seed") = 0);
  py::register_exception<simt::Error>(m, "Error");
}
