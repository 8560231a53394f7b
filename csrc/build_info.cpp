// What was compiled, and with what, as one JSON text behind a C symbol: a separate library without
// symbols of torch or Python, so that it works under any Python, even if the operators fail to
// load. The values are macros set by setup.py.

#if defined(__clang__)
#define PCKA_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define PCKA_COMPILER "g++ " __VERSION__
#else
#define PCKA_COMPILER "unknown"
#endif

// clang-format off
extern "C" __attribute__((visibility("default"))) const char* pcka_build_info() {
  return "{\"compiler\": \"" PCKA_COMPILER "\""
         ", \"torch_version\": \"" PCKA_TORCH_VERSION "\""  // whose headers were used
         ", \"minimum_torch\": \"" PCKA_MINIMUM_TORCH "\""  // whose stable ABI is targeted
         ", \"cuda_version\": \"" PCKA_CUDA_VERSION "\""    // of nvcc; empty without CUDA
         ", \"cuda_archs\": \"" PCKA_CUDA_ARCHS "\""        // comma-separated, "sm_80,sm_90"
         ", \"note\": \"" PCKA_NOTE "\"}";                // why there is no CUDA code
}
// clang-format on
