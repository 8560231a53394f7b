// Where the kernels of this folder are registered.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../library.h"

// The emulator under tests/emulation runs them on tensors of the CPU.
#if defined(PCKA_EMULATION)
#define PCKA_KERNELS(m) PCKA_LIBRARY_IMPL(CPU, m)
#else
#define PCKA_KERNELS(m) PCKA_LIBRARY_IMPL(CUDA, m)
#endif
