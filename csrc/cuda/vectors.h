// Accesses of 16 bytes, the widest that a thread makes, and the tails that are narrower.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pcka {

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Whether vectors of T may start at multiples of their size: `data` is aligned, and so is every
// stride given.
template <typename T, typename... Strides>
bool vectors_aligned(const T* data, Strides... strides) {
  constexpr int64_t size = Vector<T>::kSize;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides % size == 0) && ...);
}

#if defined(__CUDACC__) || defined(PCKA_EMULATION)

// Neighbours, `stride` apart: a whole vector in one access where `wide`, else `count` of them and
// zeros.
template <typename T>
__device__ inline Vector<T> load(const T* data, int count, int64_t stride, bool wide) {
  if (wide && count >= Vector<T>::kSize) return *reinterpret_cast<const Vector<T>*>(data);
  Vector<T> vector;
  for (int i = 0; i < Vector<T>::kSize; ++i) vector.values[i] = i < count ? data[i * stride] : T(0);
  return vector;
}

template <typename T>
__device__ inline void store(
    T* data, const Vector<T>& vector, int count, int64_t stride, bool wide) {
  if (wide && count >= Vector<T>::kSize) {
    *reinterpret_cast<Vector<T>*>(data) = vector;
    return;
  }
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i < count) data[i * stride] = vector.values[i];
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

#endif

}  // namespace pcka
