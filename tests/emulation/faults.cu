#include "faults.h"

#include <cuda_runtime.h>

namespace {

constexpr int kCount = 64;

struct alignas(16) Four {
  float values[4];
};

// Reverses blocks of kCount values through shared memory.
__global__ void correct(const float* in, float* out, int64_t count) {
  __shared__ float values[kCount];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCount + threadIdx.x;
  values[threadIdx.x] = i < count ? in[i] : 0;
  __syncthreads();
  if (i < count) out[i] = values[kCount - 1 - threadIdx.x];
}

__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float values[kCount];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[kCount - 1 - threadIdx.x];
}

__global__ void overrun_read(const float* in, float* out, int64_t count) {
  const float value = in[threadIdx.x];
  if (threadIdx.x < count) out[threadIdx.x] = value;
}

__global__ void overrun_write(const float* in, float* out, int64_t count) {
  out[threadIdx.x] = threadIdx.x < count ? in[threadIdx.x] : 0;
}

__global__ void unwritten_output(const float* in, float* out, int64_t count) {
  if (threadIdx.x < count - 1) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void unwritten_shared(float* out) {
  __shared__ float values[kCount];
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void misaligned_vector(const float* in, float* out) {
  *reinterpret_cast<Four*>(out + 4 * (threadIdx.x % 2)) = *reinterpret_cast<const Four*>(in + 1);
}

__global__ void blocks_collide(float* out) { out[threadIdx.x] = 1; }

// Every block reads the first value, and one writes it.
__global__ void block_writes_what_others_read(float* values, float* out) {
  out[blockIdx.x] = values[0];
  if (blockIdx.x == 0) values[0] = 1;
}

}  // namespace

void run_correct(const float* in, float* out, int64_t count) {
  emulation::launch(correct, 2, kCount, in, out, count);
}
void run_missing_barrier(const float* in, float* out) {
  emulation::launch(missing_barrier, 1, kCount, in, out);
}
void run_overrun_read(const float* in, float* out, int64_t count) {
  emulation::launch(overrun_read, 1, kCount, in, out, count);
}
void run_overrun_write(const float* in, float* out, int64_t count) {
  emulation::launch(overrun_write, 1, kCount, in, out, count);
}
void run_unwritten_output(const float* in, float* out, int64_t count) {
  emulation::launch(unwritten_output, 1, kCount, in, out, count);
}
void run_unwritten_shared(float* out) { emulation::launch(unwritten_shared, 1, kCount, out); }
void run_divergent_barrier(float* out) { emulation::launch(divergent_barrier, 1, kCount, out); }
void run_misaligned_vector(const float* in, float* out) {
  emulation::launch(misaligned_vector, 1, 2u, in, out);
}
void run_blocks_collide(float* out) { emulation::launch(blocks_collide, 2, kCount, out); }
void run_block_writes_what_others_read(float* values, float* out) {
  emulation::launch(block_writes_what_others_read, 2, 1u, values, out);
}
