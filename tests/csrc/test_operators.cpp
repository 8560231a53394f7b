// The operators called through torch's dispatcher from a program without Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "geometry.h"
#include "library.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor random_tensor(const std::vector<int64_t>& shape) {
  Tensor tensor = torch::stable::empty(shape, ScalarType::Double);
  double* values = static_cast<double*>(tensor.mutable_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) values[i] = std::rand() / double{RAND_MAX} - 0.5;
  return tensor;
}

double dot(const Tensor& a, const Tensor& b) {
  const double* x = static_cast<const double*>(a.const_data_ptr());
  const double* y = static_cast<const double*>(b.const_data_ptr());
  double sum = 0;
  for (int64_t i = 0; i < a.numel(); ++i) sum += x[i] * y[i];
  return sum;
}

Tensor patchify(const Tensor& x, int64_t patch, int64_t group_by, int64_t center) {
  std::array<StableIValue, 6> stack{from(x),        from(patch),  from(patch),
                                    from(group_by), from(center), from(x.scalar_type())};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[1]);
  return to<Tensor>(stack[0]);
}

// <P x, g> = <x, P' g>
void check_adjoint(int64_t group_by) {
  const Tensor x = random_tensor({2, 3, 9, 14});
  const Tensor rows = patchify(x, 4, group_by, pcka::kNone);
  const Tensor g = random_tensor({rows.size(0), rows.size(1), rows.size(2)});
  const Tensor back = random_tensor({2, 3, 9, 14});
  const int64_t patch = 4;
  std::array<StableIValue, 5> stack{from(back), from(g), from(patch), from(patch), from(group_by)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify_backward_", "", stack.data(), TORCH_ABI_VERSION));
  CHECK(std::abs(dot(rows, g) - dot(x, back)) < 1e-11);
}

// A representation is perfectly aligned with itself, and there the gradient vanishes.
void check_self_alignment() {
  const Tensor x = random_tensor({3, 8, 5});
  const bool yes = true, no = false;
  std::array<StableIValue, 5> stack{from(x), from(x), from(yes), from(yes), from(no)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::cka", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor alignment = to<Tensor>(stack[0]), grad = to<Tensor>(stack[1]);
  CHECK(to<Tensor>(stack[2]).numel() == 0);
  for (int64_t g = 0; g < 3; ++g) {
    CHECK(std::abs(static_cast<const double*>(alignment.const_data_ptr())[g] - 1) < 1e-12);
  }
  CHECK(dot(grad, grad) < 1e-20);
}

template <typename F>
void check_refusal(const std::string& wanted, F&& f) {
  std::string message;
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  CHECK(message.find(wanted) != std::string::npos);
}

}  // namespace

int main() {
  for (int64_t group_by = 0; group_by < 3; ++group_by) check_adjoint(group_by);
  check_self_alignment();
  check_refusal("group_by must be", [] { pcka::make_geometry(2, 3, 8, 8, 4, 4, 5); });
  check_refusal("teacher must be on the device of student", [] {
    const torch::stable::Device meta(torch::headeronly::DeviceType::Meta);
    const Tensor elsewhere = torch::stable::empty({2}, ScalarType::Double, std::nullopt, meta);
    pcka::check_device(elsewhere, "teacher", random_tensor({2}), "student");
  });
  return failures != 0;
}
