// A tensor as its memory lies, and where in it the groups along one of its dimensions are; shared
// by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace pcka {

// Element i of memory belongs to group i / stride % groups.
struct GroupedMemory {
  int64_t count, groups, stride;
};

// What scale_groups_ is called with: tensors of one shape that fill the same stretch of memory in
// the same order, and one factor for each group.
inline GroupedMemory check_scale_groups(
    const Tensor& out, const Tensor& gradient, const Tensor& factor, int64_t dim) {
  check_device(out, "out", gradient, "gradient");
  check_device(factor, "factor", gradient, "gradient");
  const ScalarType dtype = gradient.scalar_type();
  STD_TORCH_CHECK(
      out.scalar_type() == dtype ||
          (out.scalar_type() == ScalarType::Half && dtype == ScalarType::Float),
      "out must be of gradient's dtype, or float16 for float32");
  STD_TORCH_CHECK(
      dim >= 0 && dim < gradient.dim() && out.dim() == gradient.dim(),
      "dim must be one of gradient's ", gradient.dim(), " dimensions, got ", dim);
  STD_TORCH_CHECK(
      factor.dim() == 1 && factor.size(0) == gradient.size(dim) && factor.is_contiguous() &&
          factor.scalar_type() == accumulation_dtype(dtype),
      "factor must be a contiguous (", gradient.size(dim),
      ") of the dtype that sums are formed in");
  std::vector<std::array<int64_t, 2>> order;  // strides and sizes, from the fastest
  for (int64_t i = 0; i < gradient.dim(); ++i) {
    STD_TORCH_CHECK(out.size(i) == gradient.size(i), "out must have gradient's shape");
    if (gradient.size(i) == 1) continue;
    STD_TORCH_CHECK(out.stride(i) == gradient.stride(i), "out must have gradient's strides");
    order.push_back({gradient.stride(i), gradient.size(i)});
  }
  std::sort(order.begin(), order.end());
  int64_t filled = 1;
  for (const auto& [stride, size] : order) {
    STD_TORCH_CHECK(stride == filled, "gradient must fill its memory without gaps");
    filled *= size;
  }
  const int64_t groups = gradient.size(dim);
  return {filled, groups, groups == 1 ? filled : gradient.stride(dim)};
}

// Calls f(gradient_t{}, out_t{}) for the types of a gradient and of what it is written to.
template <typename F>
void dispatch_gradient_and_out(ScalarType gradient, ScalarType out, F&& f) {
  dispatch_floating(gradient, "gradient", [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), float>) {
      if (out == ScalarType::Half) return f(zero, Half{});
    }
    f(zero, zero);
  });
}

}  // namespace pcka
