// Memory accesses: of up to 16 bytes, the widest that a thread makes, with narrower tails; and
// through the read-only path.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pcka {

constexpr int64_t kPart = int64_t{1} << 13;  // elements of a large matrix that a block works on

template <typename T, int size = 16 / sizeof(T)>
struct alignas(size * sizeof(T)) Vector {
  static constexpr int kSize = size;
  T values[kSize];
};

// Whether vectors of T may start at multiples of their size: `data` is aligned, and so is every
// stride given.
template <typename T, typename... Strides>
bool vectors_aligned(const T* data, Strides... strides) {
  [[maybe_unused]] constexpr int64_t size = Vector<T>::kSize;  // unused without strides
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides % size == 0) && ...);
}

// Neighbouring values: a whole vector in one access if `wide`, else `count` values and zeros.
template <typename vector_t, typename T>
__device__ inline vector_t load(const T* data, int count, bool wide) {
  if (wide && count >= vector_t::kSize) return *reinterpret_cast<const vector_t*>(data);
  vector_t vector;
  for (int i = 0; i < vector_t::kSize; ++i) vector.values[i] = i < count ? data[i] : T(0);
  return vector;
}

template <typename T, int size>
__device__ inline void store(T* data, const Vector<T, size>& vector, int count, bool wide) {
  if (wide && count >= size) {
    *reinterpret_cast<Vector<T, size>*>(data) = vector;
    return;
  }
  for (int i = 0; i < size; ++i) {
    if (i < count) data[i] = vector.values[i];
  }
}

// f(first, count) for the block's share of [begin, end): whole vectors, or parts of those that
// begin or end within one. Vectors start at multiples of `size`.
template <int size, typename F>
__device__ inline void for_each_vector(int64_t begin, int64_t end, F&& f) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  for (int64_t i = begin / size * size + threadIdx.x * size; i < end; i += step) {
    const int64_t first = max(i, begin);
    f(first, static_cast<int>(min(i + size, end) - first));
  }
}

// f(group, first, count) for the block's vectors of the matrices of `groups` groups. A block works
// on one of a group's ceil_div(elements, kPart) parts at a time.
template <int size, typename F>
__device__ inline void for_each_vector_of_groups(
    int64_t groups, int64_t elements, int64_t parts, F&& f) {
  for (int64_t i = blockIdx.x; i < groups * parts; i += gridDim.x) {
    const int64_t group = i / parts, begin = group * elements + i % parts * kPart;
    for_each_vector<size>(
        begin, min(begin + kPart, (group + 1) * elements),
        [&](int64_t first, int count) { f(group, first, count); });
  }
}

// Keeps the compiler from recomputing a pointer at each use, with 64-bit sums of its own: a 32-bit
// offset is then added in one instruction.
template <typename T>
__device__ inline void keep_in_registers([[maybe_unused]] const T*& pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
#endif
}

// Loads what nothing writes while the kernel runs, through the read-only path.
template <typename T>
__device__ inline T load_constant(const T* pointer) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    return T(__ldg(reinterpret_cast<const unsigned short*>(pointer)), T::from_bits());
  } else {
    return __ldg(pointer);
  }
#else
  return *pointer;
#endif
}

}  // namespace pcka
