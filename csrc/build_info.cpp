// What was compiled, and by what: a module of its own without torch headers, so that it answers
// even where the operators fail to load. The values are macros set by setup.py.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Compile-time facts of the pcka operators.";
  m.attr("compiler") =
#if defined(__clang__)
      "clang " __clang_version__;
#elif defined(__GNUC__)
      "g++ " __VERSION__;
#else
      "unknown";
#endif
  m.attr("torch_version") = PCKA_TORCH_VERSION;  // that the headers came from
  m.attr("minimum_torch") = PCKA_MINIMUM_TORCH;  // whose stable ABI was asked for
  m.attr("cuda_version") = PCKA_CUDA_VERSION;    // of nvcc; empty without CUDA
  m.attr("cuda_archs") = PCKA_CUDA_ARCHS;        // comma-separated, e.g. "sm_80,sm_90"
  m.attr("note") = PCKA_NOTE;                    // why there is no CUDA code, if there is none
}
