// Statistics of a pair of Grams: argument checks and the closing formula, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "geometry.h"  // check_table
#include "resize.h"    // PCKA_HOST_DEVICE

namespace pcka {

// coefficients (G, 3) of the gradient: dK = 2 (a L - b K) and dL = 2 (a K - c L).
struct GroupAlignment {
  double alignment;
  double a, b, c;
};

// From <K, L>, <K, K>, <L, L> of Grams scaled by 1 / |X_c|^2 and 1 / |Y_c|^2 (so that nothing
// overflows), and the energies |X|^2, |X_c|^2 of both sides. A group that is constant (or zero,
// uncentered) up to rounding aligns with nothing: alignment 0 and gradient 0, never NaN.
PCKA_HOST_DEVICE inline GroupAlignment align_group(
    double kl, double kk, double ll, const double* energy_x, const double* energy_y, bool center,
    double epsilon) {
  const double threshold = center ? 64 * epsilon * epsilon : 0;
  const bool degenerate = energy_x[1] <= threshold * energy_x[0] ||
                          energy_y[1] <= threshold * energy_y[0] || kk == 0 || ll == 0;
  if (degenerate) return {0, 0, 0, 0};
  const double scale_x = 1 / energy_x[1], scale_y = 1 / energy_y[1];
  const double alignment = kl / (sqrt(kk) * sqrt(ll));
  return {
      alignment, scale_x * scale_y / (sqrt(kk) * sqrt(ll)), alignment * scale_x * scale_x / kk,
      alignment * scale_y * scale_y / ll};
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
  check_energy(energy_x, "energy_x", groups, energy_x.dim() == 3 ? energy_x.size(1) : 1);
  check_energy(energy_y, "energy_y", groups, energy_y.dim() == 3 ? energy_y.size(1) : 1);
  STD_TORCH_CHECK(
      alignment.dim() == 1 && alignment.size(0) == groups && alignment.is_contiguous() &&
          alignment.scalar_type() == accumulation_dtype(k.scalar_type()),
      "alignment must be a contiguous (", groups, ") of the dtype that sums are formed in");
}

// What alignment_gradient_ is called with: factors of the Grams' sizes, in one dtype.
inline void check_alignment_gradient(
    const std::optional<Tensor>& factor_x, const std::optional<Tensor>& factor_y,
    const std::optional<Tensor>& factor_cross, const Tensor& k, const Tensor& l,
    const std::optional<Tensor>& cross, const Tensor& coefficients) {
  check_grams(k, l, cross);
  check_table(coefficients, "coefficients", k.size(0), 3);
  check_device(coefficients, "coefficients", k, "k");
  std::optional<ScalarType> dtype;
  const auto check = [&](const std::optional<Tensor>& factor, const char* name,
                         const Tensor& gram) {
    if (!factor.has_value()) return;
    if (!dtype) dtype = factor->scalar_type();
    check_device(*factor, name, gram, "the Grams");
    STD_TORCH_CHECK(
        factor->dim() == 3 && factor->size(0) == gram.size(0) && factor->size(1) == gram.size(1) &&
            factor->size(2) == gram.size(2) && factor->is_contiguous() &&
            factor->scalar_type() == *dtype,
        name, " must be a contiguous (", gram.size(0), ", ", gram.size(1), ", ", gram.size(2),
        ") of the factors' dtype");
  };
  check(factor_x, "factor_x", k);
  check(factor_y, "factor_y", l);
  STD_TORCH_CHECK(!factor_cross.has_value() || cross.has_value(), "factor_cross asks for a cross");
  if (cross.has_value()) check(factor_cross, "factor_cross", *cross);
}

// The dtype of the factors that are asked for, or of the Grams.
inline ScalarType factor_dtype(
    const std::optional<Tensor>& factor_x, const std::optional<Tensor>& factor_y,
    const std::optional<Tensor>& factor_cross, const Tensor& k) {
  for (const std::optional<Tensor>* factor : {&factor_x, &factor_y, &factor_cross}) {
    if (factor->has_value()) return (*factor)->scalar_type();
  }
  return k.scalar_type();
}

}  // namespace pcka
