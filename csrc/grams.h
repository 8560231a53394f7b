// Statistics of a pair of Grams: argument checks and the closing formula, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

#include "geometry.h"  // check_table
#include "resize.h"    // PCKA_HOST_DEVICE

namespace pcka {

// coefficients (G, 4) of the gradient: dK = 2 (a_x L - b K) and dL = 2 (a_y K - c L).
struct GroupAlignment {
  double alignment;
  double a_x, b, a_y, c;
};

// From <K, L>, <K, K>, <L, L> of Grams divided by |X_c|^2 and |Y_c|^2, and of both sides (as
// patchify_ gives them) the energies |X|^2, |X_c|^2 and the scale that the gradient is to take on.
// A group that is constant (or zero, uncentered) up to rounding aligns with nothing: alignment 0
// and gradient 0, never NaN.
PCKA_HOST_DEVICE inline GroupAlignment align_group(
    double kl, double kk, double ll, const double* x, const double* y, bool center,
    double epsilon) {
  const double threshold = center ? 64 * epsilon * epsilon : 0;
  const bool degenerate =
      x[1] <= threshold * x[0] || y[1] <= threshold * y[0] || kk == 0 || ll == 0;
  if (degenerate) return {0, 0, 0, 0, 0};
  const double alignment = kl / (sqrt(kk) * sqrt(ll));
  const double a = 1 / x[1] / y[1] / (sqrt(kk) * sqrt(ll));
  return {
      alignment, x[2] * a, x[2] * alignment / x[1] / x[1] / kk, y[2] * a,
      y[2] * alignment / y[1] / y[1] / ll};
}

// k (G, N_k, N_k), l (G, N_l, N_l), cross (G, N_k, N_l): contiguous, one dtype. Without cross the
// Grams must be of one size.
inline void check_grams(const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross) {
  const auto square = [](const Tensor& m) {
    return m.dim() == 3 && m.size(1) == m.size(2) && m.is_contiguous();
  };
  STD_TORCH_CHECK(square(k), "k must be a contiguous (G, N, N)");
  STD_TORCH_CHECK(square(l) && l.size(0) == k.size(0), "l must be a contiguous (G, N, N)");
  STD_TORCH_CHECK(k.scalar_type() == l.scalar_type(), "k and l must have one dtype");
  check_device(l, "l", k, "k");
  if (cross.has_value()) check_device(*cross, "cross", k, "k");
  if (cross.has_value()) {
    STD_TORCH_CHECK(
        cross->dim() == 3 && cross->size(0) == k.size(0) && cross->size(1) == k.size(1) &&
            cross->size(2) == l.size(1) && cross->is_contiguous() &&
            cross->scalar_type() == k.scalar_type(),
        "cross must be a contiguous (", k.size(0), ", ", k.size(1), ", ", l.size(1),
        ") of k's dtype");
  } else {
    STD_TORCH_CHECK(
        k.size(1) == l.size(1), "without cross, k and l must have one size, got ", k.size(1),
        " and ", l.size(1));
  }
}

// What gram_alignment_ is called with.
inline void check_gram_alignment(
    const Tensor& alignment, const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross,
    const Tensor& energy_x, const Tensor& energy_y) {
  check_grams(k, l, cross);
  check_device(alignment, "alignment", k, "k");
  check_device(energy_x, "energy_x", k, "k");
  check_device(energy_y, "energy_y", k, "k");
  const int64_t groups = k.size(0);
  check_table(energy_x, "energy_x", groups, 3);
  check_table(energy_y, "energy_y", groups, 3);
  STD_TORCH_CHECK(
      alignment.dim() == 1 && alignment.size(0) == groups && alignment.is_contiguous() &&
          alignment.scalar_type() == accumulation_dtype(k.scalar_type()),
      "alignment must be a contiguous (", groups, ") of the dtype that sums are formed in");
}

// What alignment_gradient_ is called with: factors, where they are asked for, of the sizes of k, l,
// cross and cross. Returns their one dtype, or that of the Grams where there are none.
inline ScalarType check_alignment_gradient(
    const std::array<const std::optional<Tensor>*, 4>& factors, const Tensor& k, const Tensor& l,
    const std::optional<Tensor>& cross, const Tensor& coefficients) {
  check_grams(k, l, cross);
  check_table(coefficients, "coefficients", k.size(0), 4);
  check_device(coefficients, "coefficients", k, "k");
  constexpr const char* kNames[] = {"factor_x", "factor_y", "cross_x", "cross_y"};
  std::optional<ScalarType> dtype;
  for (int i = 0; i < 4; ++i) {
    if (!factors[i]->has_value()) continue;
    STD_TORCH_CHECK(i < 2 || cross.has_value(), kNames[i], " asks for a cross");
    const Tensor &factor = **factors[i], &of = i == 0 ? k : i == 1 ? l : *cross;
    if (!dtype) dtype = factor.scalar_type();
    check_device(factor, kNames[i], k, "k");
    STD_TORCH_CHECK(
        factor.dim() == 3 && factor.size(0) == of.size(0) && factor.size(1) == of.size(1) &&
            factor.size(2) == of.size(2) && factor.is_contiguous() &&
            factor.scalar_type() == *dtype,
        kNames[i], " must be a contiguous (", of.size(0), ", ", of.size(1), ", ", of.size(2),
        ") of the factors' dtype");
  }
  return dtype ? *dtype : k.scalar_type();
}

}  // namespace pcka
