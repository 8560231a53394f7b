#include "memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

// Set by the linker: the program's first byte, its data, and the end of that.
extern "C" char __executable_start, __data_start, _end;

namespace emulation {
namespace {

constexpr std::size_t kRedzone = 4096;  // and the alignment of all that is handed out

// A fixed table: an allocator's own bookkeeping must not allocate.
std::array<Allocation, 4096> table;
std::size_t used = 0;  // of the table, from its start
std::mutex allocations_mutex;

struct Allocations {
  Allocation* begin() const { return table.data(); }
  Allocation* end() const { return table.data() + used; }
} allocations;

Allocation* find_begin(const void* begin) {
  for (Allocation& allocation : allocations) {
    if (allocation.begin == begin) return &allocation;
  }
  return nullptr;
}

template <typename F>
F next_definition(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// Who touched a granule last. That is enough: of several writers, all but the last came before a
// barrier, or were a fault; of several readers, the last is kept, and whether there were others.
struct Shadow {
  Access write, read;
  bool several_threads = false;  // have read in the interval of `read`
  bool several_blocks = false;   // have read in the launch of `read`

  const char* record_read(const Access& access) {
    if (write.unordered_with(access)) return "race with a write of another thread";
    const bool same_launch = read.launch == access.launch;
    const bool same_interval =
        same_launch && read.block == access.block && read.interval == access.interval;
    several_threads = same_interval && (several_threads || read.thread != access.thread);
    several_blocks = same_launch && (several_blocks || read.block != access.block);
    read = access;
    return nullptr;
  }

  const char* record_write(const Access& access) {
    if (write.unordered_with(access)) return "race with a write of another thread";
    if (read.launch == access.launch && several_blocks) return "race with a read of another block";
    Access reader = read;
    if (several_threads && reader.same_thread(access)) ++reader.thread;  // stands for the others
    if (reader.unordered_with(access)) return "race with a read of another thread";
    write = access;
    return nullptr;
  }
};

namespace {

constexpr std::size_t kGranule = 2;  // bytes: the smallest type that kernels use

const char* record(
    Shadow* shadow, std::size_t offset, std::size_t size, bool write, const Access& access) {
  for (std::size_t i = offset / kGranule; i * kGranule < offset + size; ++i) {
    const char* fault = write ? shadow[i].record_write(access) : shadow[i].record_read(access);
    if (fault != nullptr) return fault;
  }
  return nullptr;
}

}  // namespace

Allocation* find_allocation(const void* address, std::size_t size) {
  static Allocation* last = table.data();
  const auto holds = [&](const Allocation& a) {
    const auto* at = static_cast<const std::byte*>(address);
    return a.begin != nullptr && at >= a.begin && at + size <= a.begin + a.size;
  };
  if (holds(*last)) return last;
  for (Allocation& allocation : allocations) {
    if (holds(allocation)) return last = &allocation;
  }
  return nullptr;
}

std::string describe_address(const void* address) {
  const auto* at = static_cast<const std::byte*>(address);
  for (const Allocation& a : allocations) {
    if (a.begin == nullptr || at < a.begin - kRedzone || at >= a.begin + a.size + kRedzone)
      continue;
    return "byte " + std::to_string(at - a.begin) + " of an allocation of " +
           std::to_string(a.size);
  }
  return "far from any allocation";
}

bool is_shared(const void* address) {
  const char* at = static_cast<const char*>(address);
  return at >= &__data_start && at < &_end;
}

bool is_constant(const void* address) {
  const char* at = static_cast<const char*>(address);
  return at >= &__executable_start && at < &__data_start;
}

const char* record_shared(const void* address, std::size_t size, bool write, const Access& access) {
  // Shared memory is another one for every block, so what earlier blocks did is forgotten.
  static std::vector<Shadow> shadows((&_end - &__data_start) / kGranule + 1);
  const std::size_t offset = static_cast<const char*>(address) - &__data_start;
  for (std::size_t i = offset / kGranule; i * kGranule < offset + size; ++i) {
    Shadow& shadow = shadows[i];
    if (shadow.read.block != access.block) shadow.read = {};
    if (shadow.write.block != access.block) {
      shadow.write = {};
      if (!write) return "the block has not written it";
    }
  }
  return record(shadows.data(), offset, size, write, access);
}

const char* record_global(
    Allocation& allocation, const void* address, std::size_t size, bool write,
    const Access& access) {
  if (allocation.shadow == nullptr) {
    allocation.shadow = new Shadow[allocation.size / kGranule + 1];
  }
  const std::size_t offset = static_cast<const std::byte*>(address) - allocation.begin;
  return record(allocation.shadow, offset, size, write, access);
}

}  // namespace emulation

// The C library's functions of these names call, from here on, the ones below.
extern "C" int posix_memalign(void** result, std::size_t alignment, std::size_t size) {
  using namespace emulation;
  static const auto original =
      next_definition<int (*)(void**, std::size_t, std::size_t)>("posix_memalign");
  void* raw = nullptr;
  if (alignment > kRedzone) std::abort();  // no tensor asks for that
  if (const int error = original(&raw, kRedzone, kRedzone + size + kRedzone)) return error;
  std::memset(raw, 0xFF, kRedzone + size + kRedzone);
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  Allocation* slot = find_begin(nullptr);
  if (slot == nullptr && used < table.size()) slot = &table[used++];
  if (slot == nullptr) std::abort();  // more live tensors than the table has room for
  *slot = {static_cast<std::byte*>(raw) + kRedzone, size, raw, nullptr};
  *result = slot->begin;
  return 0;
}

extern "C" void free(void* pointer) {
  using namespace emulation;
  static const auto original = next_definition<void (*)(void*)>("free");
  Shadow* shadow = nullptr;
  if (pointer != nullptr && reinterpret_cast<std::uintptr_t>(pointer) % kRedzone == 0) {
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    if (Allocation* slot = find_begin(pointer)) {
      pointer = slot->raw;
      shadow = slot->shadow;
      *slot = {};
    }
  }
  original(pointer);
  if (shadow != nullptr) delete[] shadow;  // comes back here, with nothing in the table
}
