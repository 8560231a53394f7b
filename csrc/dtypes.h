// Dispatch on a tensor's dtype, and the type that its sums are formed in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace pcka {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float16, bfloat16 and float32 accumulate in float32, float64 in float64.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A gradient that waits for the backward pass: float16 would lose what loss scaling is to save.
inline ScalarType gradient_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

inline void check_floating(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      name, " must be float16, bfloat16, float32 or float64, got dtype ", static_cast<int>(dtype));
}

// Kernels read addresses: those of another device are none.
inline void check_device(
    const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(
      tensor.device() == other.device(), name, " must be on the device of ", other_name,
      ": move one of them with .to()");
}

// Calls f(scalar_t{}) for the type of a floating dtype; `name` is the argument named in the error.
template <typename F>
void dispatch_floating(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      check_floating(dtype, name);
  }
}

// Calls f(scalar_t{}, rows_t{}) for the types of a map and its rows.
template <typename F>
void dispatch_map_and_rows(ScalarType map, ScalarType rows, const char* name, F&& f) {
  dispatch_floating(map, name, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (std::is_same_v<scalar_t, BFloat16>) {
      if (rows == ScalarType::BFloat16) return f(zero, zero);
    }
    f(zero, acc_type<scalar_t>{});
  });
}

// Calls f(scalar_t{}) for the type of rows and Grams.
template <typename F>
void dispatch_rows(ScalarType dtype, const char* name, F&& f) {
  STD_TORCH_CHECK(
      dtype != ScalarType::Half, name, " must be bfloat16, float32 or float64, got float16");
  dispatch_floating(dtype, name, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), Half>) f(zero);
  });
}

// Calls f(gram_t{}, factor_t{}) for the types of Grams and of the factors formed of them.
template <typename F>
void dispatch_gram_and_factor(ScalarType gram, ScalarType factor, F&& f) {
  STD_TORCH_CHECK(
      factor == gram || (gram == ScalarType::Float && factor == ScalarType::BFloat16),
      "the factors must be of the Grams' dtype, or bfloat16 for float32");
  dispatch_rows(gram, "k", [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), float>) {
      if (factor == ScalarType::BFloat16) return f(zero, BFloat16{});
    }
    f(zero, zero);
  });
}

}  // namespace pcka
