// Sums and maxima over a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"  // kThreads

namespace pcka {

// The largest value over the block's threads; every thread gets it.
__device__ inline double block_max(double value) {
  __shared__ double shared[kThreads];
  __syncthreads();  // the readers of an earlier maximum are done
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      shared[threadIdx.x] = max(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[0];
}

// Sums of `count` values over the block, in a fixed order; every thread gets them.
template <int count>
__device__ inline void block_sum(double (&values)[count]) {
  __shared__ double shared[count][kThreads];
  __syncthreads();  // an earlier call's readers are done
  for (int i = 0; i < count; ++i) shared[i][threadIdx.x] = values[i];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      for (int i = 0; i < count; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
    }
    __syncthreads();
  }
  for (int i = 0; i < count; ++i) values[i] = shared[i][0];
}

}  // namespace pcka
