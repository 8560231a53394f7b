// Stands in for CUDA's own header where kernels are compiled as plain C++ for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads emulation::barrier

#define threadIdx (emulation::this_thread().thread)
#define blockIdx (emulation::this_thread().block)
#define blockDim (emulation::this_thread().threads_per_block)
#define gridDim (emulation::this_thread().blocks)

using std::abs;
using std::max;
using std::min;
using std::sqrt;

using cudaError_t = int;
using cudaStream_t = void*;

struct dim3 {
  explicit dim3(unsigned size) : x(size) {}
  unsigned x;
};

namespace emulation {

constexpr unsigned kMaxBlocks = 7;  // few, so that kernels' loops over further blocks are reached

template <typename... Params, std::size_t... i>
void launch_with(
    void (*kernel)(Params...), unsigned blocks, unsigned threads, void** arguments,
    std::index_sequence<i...>) {
  launch(kernel, blocks, threads, *static_cast<Params*>(arguments[i])...);
}

}  // namespace emulation

template <typename... Params>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Params...), dim3 blocks, dim3 threads, void** arguments, std::size_t,
    cudaStream_t) {
  emulation::launch_with(
      kernel, std::min(blocks.x, emulation::kMaxBlocks), threads.x, arguments,
      std::index_sequence_for<Params...>{});
  return 0;
}
