// Dispatch on a tensor's dtype, and the type that its sums are formed in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace pcka {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float16, bfloat16 and float32 accumulate in float32, float64 in float64.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows are of the dtype that sums are formed in; those of a bfloat16 map may be bfloat16.
inline void check_rows_dtype(ScalarType rows, const char* name, ScalarType map) {
  STD_TORCH_CHECK(
      rows == accumulation_dtype(map), name, " must be the dtype that sums are formed in");
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
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(
          false, name, " must be float16, bfloat16, float32 or float64, got dtype ",
          static_cast<int>(dtype));
  }
}

// The same for the two types that sums are formed in.
template <typename F>
void dispatch_accumulation(ScalarType dtype, const char* name, F&& f) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double, name,
      " must be float32 or float64, got dtype ", static_cast<int>(dtype));
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace pcka
