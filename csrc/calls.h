// The operators, and torch's batched product, called through the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "dtypes.h"
#include "library.h"

namespace pcka {

using torch::stable::detail::from;
using torch::stable::detail::to;

inline void call_patchify(
    const Tensor& rows, const Tensor& energy, const Tensor& input,
    const std::optional<Tensor>& second, int64_t patch_h, int64_t patch_w, int64_t group_by,
    int64_t center, bool scale) {
  std::array<StableIValue, 9> stack{from(rows),     from(energy),  from(input),
                                    from(second),   from(patch_h), from(patch_w),
                                    from(group_by), from(center),  from(scale)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify_", "", stack.data(), TORCH_ABI_VERSION));
}

inline void call_patchify_backward(
    const Tensor& grad_input, const Tensor& grad_rows, int64_t patch_h, int64_t patch_w,
    int64_t group_by) {
  std::array<StableIValue, 5> stack{
      from(grad_input), from(grad_rows), from(patch_h), from(patch_w), from(group_by)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify_backward_", "", stack.data(), TORCH_ABI_VERSION));
}

// out = a b, batched. Deliberately the out= variants: autocast leaves them alone, while under
// autocast a plain bmm would silently round its operands to bfloat16.
inline Tensor multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

inline Tensor call_gram_alignment(
    const Tensor& alignment, const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross,
    const Tensor& energy_x, const Tensor& energy_y, bool center) {
  std::array<StableIValue, 7> stack{from(alignment), from(k),        from(l),     from(cross),
                                    from(energy_x),  from(energy_y), from(center)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::gram_alignment_", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

struct [[gnu::visibility("hidden")]] Factors {  // like its members
  std::optional<Tensor> x, y, cross_x, cross_y;
};

inline void call_alignment_gradient(
    const Factors& factors, const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross,
    const Tensor& coefficients) {
  std::array<StableIValue, 8> stack{from(factors.x),       from(factors.y),   from(factors.cross_x),
                                    from(factors.cross_y), from(k),           from(l),
                                    from(cross),           from(coefficients)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::alignment_gradient_", "", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace pcka
