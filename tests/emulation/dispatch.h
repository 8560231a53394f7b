// The operators as these tests call them: by library, that of the kernels under the emulator or
// that of the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>

#include "library.h"

namespace {  // of every file its own, as are the types of torch's stable ABI
namespace dispatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

template <std::size_t size>
void call(const std::string& library, const char* name, std::array<StableIValue, size>& stack) {
  const std::string full = library + "::" + name;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(full.c_str(), "", stack.data(), TORCH_ABI_VERSION));
}

struct Patches {
  int64_t height, width, group_by;
};

inline void patchify(
    const std::string& library, const Tensor& rows, const Tensor& energy, const Tensor& input,
    const std::optional<Tensor>& second, const Patches& p, int64_t center, bool scale = true) {
  std::array<StableIValue, 9> stack{from(rows),       from(energy),   from(input),
                                    from(second),     from(p.height), from(p.width),
                                    from(p.group_by), from(center),   from(scale)};
  call(library, "patchify_", stack);
}

inline void patchify_backward(
    const std::string& library, const Tensor& grad_input, const Tensor& grad_rows,
    const Patches& p) {
  std::array<StableIValue, 5> stack{
      from(grad_input), from(grad_rows), from(p.height), from(p.width), from(p.group_by)};
  call(library, "patchify_backward_", stack);
}

inline Tensor gram_alignment(
    const std::string& library, const Tensor& alignment, const Tensor& k, const Tensor& l,
    const std::optional<Tensor>& cross, const Tensor& energy_x, const Tensor& energy_y,
    bool center) {
  std::array<StableIValue, 7> stack{from(alignment), from(k),        from(l),     from(cross),
                                    from(energy_x),  from(energy_y), from(center)};
  call(library, "gram_alignment_", stack);
  return to<Tensor>(stack[0]);
}

struct Factors {
  std::optional<Tensor> x, y, cross_x, cross_y;
};

inline void alignment_gradient(
    const std::string& library, const Factors& factors, const Tensor& k, const Tensor& l,
    const std::optional<Tensor>& cross, const Tensor& coefficients) {
  std::array<StableIValue, 8> stack{from(factors.x),       from(factors.y),   from(factors.cross_x),
                                    from(factors.cross_y), from(k),           from(l),
                                    from(cross),           from(coefficients)};
  call(library, "alignment_gradient_", stack);
}

inline void scale_groups(
    const std::string& library, const Tensor& out, const Tensor& gradient, const Tensor& factor,
    int64_t dim) {
  std::array<StableIValue, 4> stack{from(out), from(gradient), from(factor), from(dim)};
  call(library, "scale_groups_", stack);
}

struct PatchCka {
  Tensor alignment, gradient;
};

inline PatchCka patch_cka(
    const std::string& library, const Tensor& student, const Tensor& teacher, const Patches& p,
    bool columns, bool center, int64_t workspace = 0) {
  const bool needs_grad = true;
  std::array<StableIValue, 9> stack{from(student), from(teacher),    from(p.height),
                                    from(p.width), from(p.group_by), from(columns),
                                    from(center),  from(needs_grad), from(workspace)};
  call(library, "patch_cka", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

struct Cka {
  Tensor alignment, grad_x, grad_y;
};

inline Cka cka(const std::string& library, const Tensor& x, const Tensor& y, bool center) {
  const bool needs_grad = true;
  std::array<StableIValue, 5> stack{
      from(x), from(y), from(center), from(needs_grad), from(needs_grad)};
  call(library, "cka", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace dispatch
}  // namespace
