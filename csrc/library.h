// The namespace of the operators: pcka, or another for a second build beside it in one process.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// Torch before 2.13 has this check under another name, and its error without the callee's text.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#if !defined(PCKA_LIBRARY)
#define PCKA_LIBRARY pcka
#endif

#define PCKA_TEXT_OF(name) #name
#define PCKA_TEXT(name) PCKA_TEXT_OF(name)
#define PCKA_OPERATOR(name) PCKA_TEXT(PCKA_LIBRARY) "::" name

// Two steps, so that PCKA_LIBRARY is expanded before it becomes part of a name.
#define PCKA_LIBRARY_OF(library, m) STABLE_TORCH_LIBRARY(library, m)
#define PCKA_LIBRARY_IMPL_OF(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define PCKA_LIBRARY_DEFINE(m) PCKA_LIBRARY_OF(PCKA_LIBRARY, m)
#define PCKA_LIBRARY_IMPL(key, m) PCKA_LIBRARY_IMPL_OF(PCKA_LIBRARY, key, m)
