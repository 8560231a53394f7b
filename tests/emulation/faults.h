// Kernels with one planted fault each, and how to launch them.
#pragma once

#include <cstdint>

// Each on one block of 64 threads, or two where the fault lies between blocks.
void run_correct(const float* in, float* out, int64_t count);
void run_missing_barrier(const float* in, float* out);
void run_overrun_read(const float* in, float* out, int64_t count);
void run_overrun_write(const float* in, float* out, int64_t count);
void run_unwritten_output(const float* in, float* out, int64_t count);
void run_unwritten_shared(float* out);
void run_divergent_barrier(float* out);
void run_misaligned_vector(const float* in, float* out);
void run_blocks_collide(float* out);
void run_block_writes_what_others_read(float* values, float* out);
