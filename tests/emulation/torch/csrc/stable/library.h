// Stands in for torch's own header where kernels, and the operators that call them, are compiled
// for the emulator: what is registered and called as `pcka` is `pcka_emulated`, beside the CPU
// operators in one process, and kernels of CUDA serve tensors of the CPU.
#pragma once

#include_next <torch/csrc/stable/library.h>

#include <string>

#define EMULATED_CUDA CPU
#define EMULATED_CompositeExplicitAutograd CompositeExplicitAutograd
#define EMULATED_IMPL(key, m) _STABLE_TORCH_LIBRARY_IMPL(pcka_emulated, key, m, C10_UID)

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(pcka_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) EMULATED_IMPL(EMULATED_##key, m)

static inline auto emulated_call_dispatcher(
    const std::string& name, const char* overload, StableIValue* stack, uint64_t version) {
  const std::string ours = "pcka::";
  const bool is_ours = name.compare(0, ours.size(), ours) == 0;
  const std::string full = is_ours ? "pcka_emulated::" + name.substr(ours.size()) : name;
  return torch_call_dispatcher(full.c_str(), overload, stack, version);
}
#define torch_call_dispatcher emulated_call_dispatcher
