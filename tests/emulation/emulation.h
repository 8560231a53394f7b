// Runs CUDA kernels that were compiled as plain C++, every thread of every block, and checks each
// of their memory accesses. How it works: README.md beside this file.
#pragma once

#include <cstdint>

namespace emulation {

struct Index {
  unsigned x;
};

// The indices of the thread that runs.
struct Thread {
  Index thread, block, threads_per_block, blocks;
};
const Thread& this_thread();

// __syncthreads
void barrier();

// A kernel with its arguments, which lie on the caller's stack.
struct Body {
  void (*call)(const void* closure);
  const void* closure;
};

// Runs `body` as every thread of every block. Throws std::runtime_error with what, where and by
// whom at the first fault.
void run(const char* kernel, unsigned blocks, unsigned threads, Body body);

template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, const Args&... args) {
  const auto closure = [&] { kernel(args...); };
  const auto call = [](const void* it) { (*static_cast<decltype(&closure)>(it))(); };
  run(__PRETTY_FUNCTION__, blocks, threads, {call, &closure});
}

}  // namespace emulation
