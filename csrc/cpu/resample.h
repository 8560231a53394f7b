// Bilinear resize of a line to at least its own length, and the adjoint, from tables made once per
// map. Lines are padded so that whole vectors can be read and written: see `padded`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../resize.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PCKA_AVX2 1
#include <immintrin.h>
#endif

namespace pcka {

constexpr int64_t kVector = 16;

// Room for a line of `count` values, such that vectors may be read beyond its end.
inline int64_t padded(int64_t count) { return (count / kVector + 3) * kVector; }

#if defined(PCKA_AVX2)
inline bool cpu_has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

template <typename acc_t>
std::vector<Tap<acc_t>> make_taps(int64_t in, int64_t out) {
  std::vector<Tap<acc_t>> taps(out);
  for (int64_t o = 0; o < out; ++o) taps[o] = bilinear_tap<acc_t>(o, in, out);
  return taps;
}

template <typename acc_t>
class Resampling {
 public:
  Resampling(int64_t in, int64_t out)
      : in_(in), out_(out), low_(padded(out), static_cast<int32_t>(in - 1)), weight_(padded(out)) {
    for (int64_t o = 0; o < out; ++o) {
      const Tap<acc_t> tap = bilinear_tap<acc_t>(o, in, out);
      low_[o] = static_cast<int32_t>(tap.low);
      weight_[o] = tap.weight;
    }
  }

  bool identity() const { return in_ == out_; }

  // line (in) -> resized (out); both with room for padded() values. Pads `line`.
  void operator()(acc_t* line, acc_t* resized) const {
    // The last pixel's right neighbour is itself; other values read there enter no output.
    std::fill_n(line + in_, kVector, line[in_ - 1]);
    int64_t o = 0;
#if defined(PCKA_AVX2)
    if constexpr (std::is_same_v<acc_t, float>) {
      if (cpu_has_avx2()) o = resample_avx2(line, resized);
    }
#endif
    for (; o < out_; ++o) {
      const acc_t* at = line + low_[o];
      resized[o] = at[0] + weight_[o] * (at[1] - at[0]);
    }
  }

 private:
#if defined(PCKA_AVX2)
  // Eight outputs read at most nine neighbouring inputs, as no line is made shorter: two loads and
  // a permutation each. Returns how many outputs were written.
  __attribute__((target("avx2,fma"))) int64_t
  resample_avx2(const acc_t* line, acc_t* resized) const {
    for (int64_t o = 0; o < out_; o += 8) {
      const __m256i first = _mm256_set1_epi32(low_[o]);
      const __m256i at = _mm256_sub_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low_.data() + o)), first);
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(line + low_[o]), at);
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(line + low_[o] + 1), at);
      const __m256 weight = _mm256_loadu_ps(weight_.data() + o);
      _mm256_storeu_ps(resized + o, _mm256_fmadd_ps(weight, _mm256_sub_ps(high, low), low));
    }
    return out_;
  }
#endif

  int64_t in_, out_;
  std::vector<int32_t> low_;
  std::vector<acc_t> weight_;
};

// The adjoint, as a gather: every source pixel sums the few resized pixels that read it.
template <typename acc_t>
class ResamplingAdjoint {
 public:
  ResamplingAdjoint(int64_t in, int64_t out)
      : in_(in), begin_(padded(in), static_cast<int32_t>(out)) {
    for (int64_t i = 0; i < in; ++i) {
      const Range range = readers(i, in, out);
      readers_ = std::max(readers_, range.end - range.begin);
    }
    weight_.resize(readers_ * padded(in));
    for (int64_t i = 0; i < in; ++i) {
      // The same number of readers for all; those that do not read the pixel have weight 0.
      begin_[i] = static_cast<int32_t>(std::min(readers(i, in, out).begin, out - readers_));
      for (int64_t j = 0; j < readers_; ++j) {
        weight_[j * padded(in) + i] = adjoint_weight<acc_t>(i, begin_[i] + j, in, out);
      }
    }
    std::fill(begin_.begin() + in, begin_.end(), begin_[in - 1]);
    narrow_ = true;
    for (int64_t i = 0; i < in; i += 8) narrow_ = narrow_ && begin_[i + 7] - begin_[i] < 16;
  }

  // resized (out) -> line (in); both with room for padded() values, those of `resized` finite.
  void operator()(const acc_t* resized, acc_t* line) const {
#if defined(PCKA_AVX2)
    if constexpr (std::is_same_v<acc_t, float>) {
      if (narrow_ && cpu_has_avx2()) return gather_avx2(resized, line);
    }
#endif
    std::fill_n(line, in_, 0);
    for (int64_t j = 0; j < readers_; ++j) {
      const acc_t* weight = weight_.data() + j * padded(in_);
      for (int64_t i = 0; i < in_; ++i) line[i] += weight[i] * resized[begin_[i] + j];
    }
  }

 private:
#if defined(PCKA_AVX2)
  // If no line is made twice as long or longer, the readers of eight neighbours lie in two vectors.
  __attribute__((target("avx2,fma"))) void gather_avx2(const acc_t* resized, acc_t* line) const {
    for (int64_t i = 0; i < in_; i += 8) {
      const __m256i begin = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(begin_.data() + i));
      const __m256i at = _mm256_sub_epi32(begin, _mm256_set1_epi32(begin_[i]));
      const __m256 in_second = _mm256_castsi256_ps(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(7)));
      __m256 sum = _mm256_setzero_ps();
      for (int64_t j = 0; j < readers_; ++j) {
        const float* from = resized + begin_[i] + j;
        const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), at);
        const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + 8), at);
        const __m256 weight = _mm256_loadu_ps(weight_.data() + j * padded(in_) + i);
        sum = _mm256_fmadd_ps(weight, _mm256_blendv_ps(first, second, in_second), sum);
      }
      _mm256_storeu_ps(line + i, sum);
    }
  }
#endif

  int64_t in_, readers_ = 0;
  bool narrow_;
  std::vector<int32_t> begin_;
  std::vector<acc_t> weight_;  // (readers, in)
};

}  // namespace pcka
