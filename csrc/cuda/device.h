// The few words of CUDA that dsft's kernels use. nvcc compiles them as they are; any other compiler gets a simulation
// (simulation.h), so that the same kernel text runs in every test, also without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define DSFT_SHARED(type, name, count) __shared__ type name[count]
#define DSFT_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace dsft {
inline int32_t launch_error() { return static_cast<int32_t>(cudaGetLastError()); }
}  // namespace dsft

#else
#include "simulation.h"
#endif

namespace dsft {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

}  // namespace dsft
