// Features of the processor.
#pragma once

namespace pcka {

// Whether the processor multiplies bfloat16 faster than float32.
inline bool cpu_multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace pcka
