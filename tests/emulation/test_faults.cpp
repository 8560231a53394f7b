// Every planted fault is caught, and named; a correct kernel raises nothing.

#include "faults.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>

#include "check.h"

namespace {

// `count` floats from where the emulator watches.
struct Floats {
  explicit Floats(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(float)) != 0) throw std::bad_alloc();
    values = static_cast<float*>(memory);
  }
  ~Floats() { std::free(values); }
  float* values;
};

void check_caught(const std::function<void()>& kernel, const std::string& fault) {
  std::string message;
  try {
    kernel();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  if (message.find(fault) == std::string::npos) {
    std::printf("wanted \"%s\", got \"%s\"\n", fault.c_str(), message.c_str());
  }
  CHECK(message.find(fault) != std::string::npos);
}

}  // namespace

int main() {
  constexpr int64_t kCount = 64, kShort = 61;
  const Floats in(2 * kCount), out(2 * kCount), short_in(kShort), short_out(kShort);
  for (int64_t i = 0; i < 2 * kCount; ++i) in.values[i] = static_cast<float>(i);
  for (int64_t i = 0; i < kShort; ++i) short_in.values[i] = static_cast<float>(i);

  run_correct(in.values, out.values, 2 * kCount);
  for (int64_t i = 0; i < kCount; ++i) CHECK(out.values[i] == kCount - 1 - i);

  check_caught([&] { run_missing_barrier(in.values, out.values); }, "shared memory");
  check_caught(
      [&] { run_overrun_read(short_in.values, out.values, kShort); },
      "out of bounds: read of 4 bytes, byte 244 of an allocation of 244");
  check_caught(
      [&] { run_overrun_write(in.values, short_out.values, kShort); },
      "out of bounds: write of 4 bytes, byte 244 of an allocation of 244");
  check_caught(
      [&] { run_unwritten_shared(out.values); },
      "read of shared memory: the block has not written it [thread 0 of block 0]");
  check_caught([&] { run_divergent_barrier(out.values); }, "divergent barrier");
  check_caught(
      [&] { run_misaligned_vector(in.values, out.values); }, "misaligned read of 16 bytes");
  check_caught([&] { run_blocks_collide(out.values); }, "race with a write of another thread");
  for (int i = 0; i < 20; ++i) {  // the blocks run in a random order, and in either it is a race
    check_caught(
        [&] { run_block_writes_what_others_read(short_in.values, out.values); }, "race with a ");
  }

  const Floats fresh(kCount);
  run_unwritten_output(in.values, fresh.values, kCount);
  CHECK(std::isnan(fresh.values[kCount - 1]) && fresh.values[0] == 0);
  return failures != 0;
}
