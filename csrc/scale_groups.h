// scale_groups_: argument checks and dispatch, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace pcka {

// Values in memory order. Value i belongs to group i / stride % groups.
struct GroupedMemory {
  int64_t count, groups, stride;
};

// A kernel's arguments: out[i] = factors[group of i] * gradient[i].
template <typename gradient_t, typename out_t>
struct ScaleGroups {
  const gradient_t* gradient;
  GroupedMemory memory;  // of gradient and out alike
  const acc_type<gradient_t>* factors;
  out_t* out;  // may be gradient
};

// Checks the arguments of scale_groups_: dense tensors of one shape and memory layout, and one
// factor per group.
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
      "factor must be a contiguous tensor of shape (", gradient.size(dim),
      ") of the accumulation dtype");
  std::vector<std::array<int64_t, 2>> order;  // strides and sizes, fastest first
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

// Calls f(gradient_t{}, out_t{}) for the types of a gradient and of its output.
template <typename F>
void dispatch_gradient_and_out(ScalarType gradient, ScalarType out, F&& f) {
  dispatch_floating(gradient, "gradient", [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), float>) {
      if (out == ScalarType::Half) return f(zero, Half{});
    }
    f(zero, zero);
  });
}

// The operator. Device::run(ScaleGroups, a tensor on the device) does the work.
template <typename Device>
void scale_groups(
    const Tensor& out,       // of gradient's shape and strides; written, may be gradient
    const Tensor& gradient,  // dense
    const Tensor& factor,    // (G), along dim
    int64_t dim) {
  const GroupedMemory memory = check_scale_groups(out, gradient, factor, dim);
  dispatch_gradient_and_out(gradient.scalar_type(), out.scalar_type(), [&](auto from, auto to) {
    using gradient_t = decltype(from);
    using out_t = decltype(to);
    const ScaleGroups<gradient_t, out_t> job{
        data<gradient_t>(gradient), memory, data<acc_type<gradient_t>>(factor),
        mutable_data<out_t>(out)};
    Device::run(job, gradient);
  });
}

}  // namespace pcka
