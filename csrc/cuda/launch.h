// How kernels are launched: sizes, the current stream, and the check that follows a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace pcka {

constexpr int kThreads = 256;

// Blocks for `count` items of a grid-stride loop; 64-bit, capped well under the grid's limit.
inline unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(
      std::min<int64_t>((count + kThreads - 1) / kThreads, int64_t{1} << 20));
}

// One block an item, items beyond the cap by the kernel's own block-stride loop.
inline unsigned one_block_each(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>(count, int64_t{1} << 20));
}

// The tensor's device made current, and torch's stream on it.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#if defined(__CUDACC__)
__device__ inline int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Sums of `count` values over a block of kThreads threads, in a fixed order; every thread gets
// them. The tree keeps the result the same from run to run.
template <int count>
__device__ inline void block_sum(double (&values)[count]) {
  __shared__ double shared[count][kThreads];
  __syncthreads();  // an earlier call's readers are done
  for (int i = 0; i < count; ++i) shared[i][threadIdx.x] = values[i];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      for (int i = 0; i < count; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
    }
    __syncthreads();
  }
  for (int i = 0; i < count; ++i) values[i] = shared[i][0];
}
#endif

}  // namespace pcka
