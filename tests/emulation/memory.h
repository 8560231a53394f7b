// The memory that kernels may touch, and who touched it last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

// A block of memory handed out by posix_memalign, as torch takes its tensors' from. It stands
// between redzones, and holds NaN (all bits set) until it is written.
struct Allocation {
  std::byte* begin = nullptr;
  std::size_t size = 0;
  void* raw = nullptr;              // what the C library gave
  struct Shadow* shadow = nullptr;  // of every granule, once a kernel has touched it
};

// The allocation that holds [address, address + size), or null.
Allocation* find_allocation(const void* address, std::size_t size);

// Where an address lies relative to the nearest allocation, for a message.
std::string describe_address(const void* address);

// The __shared__ variables, which are static, lie among the program's data.
bool is_shared(const void* address);
bool is_constant(const void* address);

struct Access {
  std::uint32_t launch = 0;    // counted from 1
  std::uint32_t block = 0;     // counted from 1, over all launches
  std::uint32_t interval = 0;  // between barriers, within the block
  std::uint32_t thread = 0;

  bool same_thread(const Access& other) const {
    return block == other.block && thread == other.thread;
  }
  // Of one launch, by two threads, with no barrier between.
  bool unordered_with(const Access& other) const {
    return launch == other.launch && !same_thread(other) &&
           (block != other.block || interval == other.interval);
  }
};

// Record an access, and return what is wrong with it, or null.
const char* record_shared(const void* address, std::size_t size, bool write, const Access& access);
const char* record_global(
    Allocation& allocation, const void* address, std::size_t size, bool write,
    const Access& access);

}  // namespace emulation
