// Kernel launches: sizes, device, current stream and error check.
//
// Launches use the runtime's function instead of <<<>>>: the kernels are plain C++ to any compiler
// for which __global__ and the like are defined.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../library.h"

namespace pcka {

// Per block. Some kernels also set the minimum number of blocks per multiprocessor. Where it is 1,
// the compiler, left to itself, would spill registers to fit more.
constexpr int kThreads = 256;

// Blocks for `count` items. The kernels' block-stride loops cover items beyond the cap: a kernel is
// correct with any number of blocks.
inline unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min(count, int64_t{1} << 20));
}

// Makes the tensor's device current, and holds torch's stream on it.
class [[gnu::visibility("hidden")]] LaunchScope {  // like its members
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

// kernel(args...) on `blocks` blocks of kThreads threads.
template <typename... Params, typename... Args>
void launch(
    const LaunchScope& scope, void (*kernel)(Params...), unsigned blocks, const Args&... args) {
  std::tuple<Params...> typed(args...);
  const auto start = [&](Params&... params) {
    void* addresses[] = {&params...};
    return cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0, scope.stream());
  };
  STD_CUDA_CHECK(std::apply(start, typed));
}

}  // namespace pcka
