// For functions that both kernels and host code call.
#pragma once

#if defined(__CUDACC__)
#define PCKA_HOST_DEVICE __host__ __device__
#else
#define PCKA_HOST_DEVICE
#endif
