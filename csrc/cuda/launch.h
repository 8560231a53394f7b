// How kernels are launched: sizes, the current stream, the check that follows; and block-wide sums.
//
// The only file with launch syntax, so that the kernels also compile as plain C++ for the emulator
// under tests/emulation.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "../library.h"

namespace pcka {

// Of every block. The larger kernels state one block as the least that a multiprocessor is to hold:
// left to itself, the compiler saves registers for more by spilling some.
constexpr int kThreads = 256;

// Blocks for `count` items; those beyond the cap are reached by the kernels' block-stride loops.
#if defined(PCKA_EMULATION)
constexpr int64_t kMaxBlocks = 7;  // few, so that tests reach those loops
#else
constexpr int64_t kMaxBlocks = int64_t{1} << 20;
#endif
inline unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min(count, kMaxBlocks));
}

// The tensor's device made current, and torch's stream on it.
class LaunchScope {
 public:
#if defined(PCKA_EMULATION)
  explicit LaunchScope(const torch::stable::Tensor&) {}
#else
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
#endif
};

// kernel(args...) on `blocks` blocks of kThreads threads.
#if defined(PCKA_EMULATION)
template <typename Kernel, typename... Args>
void launch(const LaunchScope&, Kernel kernel, unsigned blocks, const Args&... args) {
  emulation::launch(kernel, blocks, kThreads, args...);
}
#elif defined(__CUDACC__)
template <typename Kernel, typename... Args>
void launch(const LaunchScope& scope, Kernel kernel, unsigned blocks, const Args&... args) {
  // clang-format off
  kernel<<<blocks, kThreads, 0, scope.stream()>>>(args...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

#if defined(__CUDACC__) || defined(PCKA_EMULATION)
// Keeps the compiler from forming a pointer anew at each of its uses, with 64-bit sums of its own:
// an offset of 32 bits is then added in one instruction.
template <typename T>
__device__ inline void keep_in_registers([[maybe_unused]] const T*& pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
#endif
}

// What nothing writes while the kernel runs, through the read-only path.
template <typename T>
__device__ inline T load_constant(const T* pointer) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    return T(__ldg(reinterpret_cast<const unsigned short*>(pointer)), T::from_bits());
  } else {
    return __ldg(pointer);
  }
#else
  return *pointer;
#endif
}

// The largest value of the block's threads; every thread gets it.
__device__ inline double block_max(double value) {
  __shared__ double shared[kThreads];
  __syncthreads();  // an earlier call's readers are done
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      shared[threadIdx.x] = max(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[0];
}

// Sums of `count` values over the block, in a fixed order; every thread gets them.
template <int count>
__device__ inline void block_sum(double (&values)[count]) {
  __shared__ double shared[count][kThreads];
  __syncthreads();  // an earlier call's readers are done
  for (int i = 0; i < count; ++i) shared[i][threadIdx.x] = values[i];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      for (int i = 0; i < count; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
    }
    __syncthreads();
  }
  for (int i = 0; i < count; ++i) values[i] = shared[i][0];
}
#endif

}  // namespace pcka
