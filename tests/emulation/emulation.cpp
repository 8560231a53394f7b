#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::size_t kArgumentBytes = 64 * 1024;
constexpr unsigned kWarp = 32;

// A thread of a block: a stack of its own, left at barriers and taken up again.
struct Fiber {
  Thread index;
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
  jmp_buf resume;
  bool started = false, finished = false;
  const void* waits_at = nullptr;  // the barrier: the address that it was called from

  bool owns(const void* address) const {
    const auto* at = static_cast<const std::byte*>(address);
    return at >= stack.get() && at < stack.get() + kStackBytes;
  }
};

unsigned seed() {
  static const unsigned value = [] {
    const char* text = std::getenv("PCKA_EMULATION_SEED");
    const unsigned chosen = text ? std::strtoul(text, nullptr, 10) : std::random_device{}();
    std::printf("emulation: PCKA_EMULATION_SEED=%u\n", chosen);
    return chosen;
  }();
  return value;
}

// One launch at a time.
struct Machine {
  std::vector<Fiber> fibers;
  std::mt19937 random{seed()};
  Body body{};
  const std::byte* launcher = nullptr;  // a frame of the host's stack; arguments lie above it
  Fiber* running = nullptr;
  jmp_buf scheduler;
  ucontext_t unused;  // makecontext wants a successor; fibers leave by longjmp
  Access access;      // of the running thread
  std::string fault;
};

Machine the_machine;

[[noreturn]] void leave_fiber() { _longjmp(the_machine.scheduler, 1); }

// Ends the launch with a message.
[[noreturn]] void fail(const std::string& what) {
  Machine& m = the_machine;
  m.fault = what + " [thread " + std::to_string(m.running->index.thread.x) + " of block " +
            std::to_string(m.running->index.block.x) + "]";
  leave_fiber();
}

// Fibers are made once, and run every block's thread of their number.
void fiber_main() {
  while (true) {
    the_machine.body.call(the_machine.body.closure);
    Fiber& fiber = *the_machine.running;
    fiber.finished = true;
    if (_setjmp(fiber.resume) == 0) leave_fiber();
  }
}

// Runs a thread up to its next barrier or its end.
void resume(Fiber& fiber) {
  Machine& m = the_machine;
  m.running = &fiber;
  m.access.thread = fiber.index.thread.x;
  fiber.waits_at = nullptr;
  if (_setjmp(m.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = &m.unused;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  m.running = nullptr;
}

// Threads in the order they get their turn: warps at random, lanes in order.
std::vector<unsigned> turn_order(unsigned threads, std::mt19937& random) {
  std::vector<unsigned> warps((threads + kWarp - 1) / kWarp), order;
  std::iota(warps.begin(), warps.end(), 0);
  std::shuffle(warps.begin(), warps.end(), random);
  for (unsigned warp : warps) {
    for (unsigned t = warp * kWarp; t < std::min(threads, (warp + 1) * kWarp); ++t) {
      order.push_back(t);
    }
  }
  return order;
}

// All threads have stopped: every one at the same barrier, or every one at its end.
bool block_finished(const std::vector<Fiber>& fibers) {
  const Fiber& first = fibers.front();
  for (const Fiber& fiber : fibers) {
    if (fiber.finished != first.finished || fiber.waits_at != first.waits_at) {
      the_machine.running = const_cast<Fiber*>(&fiber);
      the_machine.fault = "divergent barrier: thread " + std::to_string(fiber.index.thread.x) +
                          (fiber.finished ? " has ended" : " waits at another barrier") +
                          ", thread 0 " + (first.finished ? "has ended" : "waits") + " [block " +
                          std::to_string(fiber.index.block.x) + "]";
      the_machine.running = nullptr;
      return true;
    }
  }
  return first.finished;
}

void run_block(unsigned block, unsigned blocks, unsigned threads) {
  Machine& m = the_machine;
  ++m.access.block;
  for (unsigned t = 0; t < threads; ++t) {
    m.fibers[t].index = {{t}, {block}, {threads}, {blocks}};
    m.fibers[t].finished = false;
  }
  do {
    ++m.access.interval;
    for (unsigned t : turn_order(threads, m.random)) {
      resume(m.fibers[t]);
      if (!m.fault.empty()) return;
    }
  } while (!block_finished(m.fibers));
}

// What every instrumented access of compiled kernel code comes to.
void check(const void* address, std::size_t size, bool write) {
  Machine& m = the_machine;
  if (m.running == nullptr) return;  // host code
  Fiber* fiber = m.running;
  const auto* index = reinterpret_cast<const std::byte*>(&fiber->index);
  const auto* at = static_cast<const std::byte*>(address);
  if (fiber->owns(address) || (at >= index && at < index + sizeof(Thread))) return;
  const bool argument = at >= m.launcher && at < m.launcher + kArgumentBytes;
  if (argument && !write) return;
  m.running = nullptr;  // what the checks themselves call is not checked
  std::string fault;
  const char* verb = write ? "write" : "read";
  if (size >= 8 && reinterpret_cast<std::uintptr_t>(address) % size != 0) {
    fault = std::string("misaligned ") + verb + " of " + std::to_string(size) + " bytes";
  } else if (is_shared(address)) {
    if (const char* what = record_shared(address, size, write, m.access)) {
      fault = std::string(verb) + " of shared memory: " + what;
    }
  } else if (Allocation* allocation = find_allocation(address, size)) {
    if (const char* what = record_global(*allocation, address, size, write, m.access)) {
      fault = std::string(verb) + " of " + describe_address(address) + ": " + what;
    }
  } else if (write || !is_constant(address)) {
    fault = std::string("out of bounds: ") + verb + " of " + std::to_string(size) + " bytes, " +
            describe_address(address);
  }
  m.running = fiber;
  if (!fault.empty()) fail(fault);
}

}  // namespace

const Thread& this_thread() { return the_machine.running->index; }

void barrier() {
  Fiber& fiber = *the_machine.running;
  fiber.waits_at = __builtin_return_address(0);
  if (_setjmp(fiber.resume) == 0) leave_fiber();
}

void run(const char* kernel, unsigned blocks, unsigned threads, Body body) {
  Machine& m = the_machine;
  m.fibers.resize(threads);
  m.body = body;
  m.launcher = static_cast<const std::byte*>(__builtin_frame_address(0));
  m.fault.clear();
  ++m.access.launch;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), m.random);
  for (unsigned block : order) {
    run_block(block, blocks, threads);
    if (m.fault.empty()) continue;
    m.fibers.clear();  // left where they stood
    throw std::runtime_error(m.fault + "\n  in " + kernel);
  }
}

}  // namespace emulation

// What -fsanitize=thread makes the compiler call before every access; its runtime is not linked.
#define PCKA_ACCESS(size)                                                                    \
  extern "C" void __tsan_read##size(void* p) { emulation::check(p, size, false); }           \
  extern "C" void __tsan_write##size(void* p) { emulation::check(p, size, true); }           \
  extern "C" void __tsan_unaligned_read##size(void* p) { emulation::check(p, size, false); } \
  extern "C" void __tsan_unaligned_write##size(void* p) { emulation::check(p, size, true); }
PCKA_ACCESS(1)
PCKA_ACCESS(2)
PCKA_ACCESS(4)
PCKA_ACCESS(8)
PCKA_ACCESS(16)
#undef PCKA_ACCESS

extern "C" {
void __tsan_read_range(void* p, std::size_t size) { emulation::check(p, size, false); }
void __tsan_write_range(void* p, std::size_t size) { emulation::check(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Host code counts references; kernels use no atomics.
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
}

// What launches ask of torch: a device that is always current, its stream, and the check after.
extern "C" {
std::int32_t aoti_torch_create_device_guard(std::int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
std::int32_t aoti_torch_get_current_cuda_stream(std::int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
void torch_c10_cuda_check_msg(
    std::int32_t, const char*, const char*, std::uint32_t, bool, char** message) {
  *message = nullptr;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
