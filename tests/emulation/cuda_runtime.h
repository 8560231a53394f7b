// Stands in for CUDA's own header where kernels are compiled as plain C++ for the emulator.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulation.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads emulation::barrier

#define threadIdx (emulation::this_thread().thread)
#define blockIdx (emulation::this_thread().block)
#define blockDim (emulation::this_thread().threads_per_block)
#define gridDim (emulation::this_thread().blocks)

using std::abs;
using std::max;
using std::min;
using std::sqrt;
