// Dtypes: dispatch, sizes, and the types that sums are accumulated in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
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

// Of a gradient kept for the backward pass: float16 would lose what loss scaling is to preserve.
inline ScalarType gradient_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Double:
      return 8;
    default:
      return 4;
  }
}

inline void check_floating(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      name, " must be float16, bfloat16, float32 or float64, got dtype ", static_cast<int>(dtype));
}

// Kernels read raw addresses, which are not valid on another device.
inline void check_device(
    const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(
      tensor.device() == other.device(), name, " must be on the device of ", other_name,
      ": move one of them with .to()");
}

// Pointer to a tensor's first value.
template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Likewise, or null without a tensor.
template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? mutable_data<T>(*tensor) : nullptr;
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

// Calls f(gram_t{}, factor_t{}) for the types of Grams and of the factors formed from them.
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
