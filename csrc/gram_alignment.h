// gram_alignment_: argument checks, dispatch and the final formula, shared by both devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "dtypes.h"
#include "geometry.h"  // check_table
#include "grams.h"
#include "host_device.h"

namespace pcka {

// coefficients (G, 4) of the gradient: dK = 2 (a_x L - b K) and dL = 2 (a_y K - c L).
struct GroupAlignment {
  double alignment;
  double a_x, b, a_y, c;
};

// From <K, L>, <K, K>, <L, L> of Grams divided by |X_c|^2 and |Y_c|^2, and for both sides (as
// returned by patchify_) the energies |X|^2, |X_c|^2 and the scale for the gradient. A group that
// is constant (or zero, if uncentered) up to rounding aligns with nothing: alignment 0 and gradient
// 0, never NaN.
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

// A kernel's arguments: the Grams and energies, and where its results go.
template <typename gram_t>
struct GramAlignment {
  using acc_t = acc_type<gram_t>;

  Grams<gram_t> grams;
  const double *energy_x, *energy_y;  // (G, 3)
  bool center;
  acc_t* alignment;      // (G)
  double* coefficients;  // (G, 4)

  // Writes the results of a group, from the sums that align_group takes.
  PCKA_HOST_DEVICE void close(int64_t group, double kl, double kk, double ll) const {
    const GroupAlignment result = align_group(
        kl, kk, ll, energy_x + 3 * group, energy_y + 3 * group, center,
        std::numeric_limits<acc_t>::epsilon());
    alignment[group] = static_cast<acc_t>(result.alignment);
    double* row = coefficients + 4 * group;
    row[0] = result.a_x, row[1] = result.b, row[2] = result.a_y, row[3] = result.c;
  }
};

// Checks the arguments of gram_alignment_.
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
      "alignment must be a contiguous tensor of shape (", groups, ") of the accumulation dtype");
}

// The operator. Device::run(GramAlignment, a tensor on the device) does the work.
template <typename Device>
Tensor gram_alignment(
    const Tensor& alignment,             // (G); written
    const Tensor& k,                     // (G, N_k, N_k)
    const Tensor& l,                     // (G, N_l, N_l)
    const std::optional<Tensor>& cross,  // (G, N_k, N_l)
    const Tensor& energy_x,              // (G, 3)
    const Tensor& energy_y,              // (G, 3)
    bool center) {
  check_gram_alignment(alignment, k, l, cross, energy_x, energy_y);
  Tensor coefficients = torch::stable::new_empty(k, {k.size(0), 4}, ScalarType::Double);
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    const GramAlignment<gram_t> job{
        make_grams<gram_t>(k, l, cross),
        data<double>(energy_x),
        data<double>(energy_y),
        center,
        mutable_data<acc_type<gram_t>>(alignment),
        mutable_data<double>(coefficients)};
    Device::run(job, k);
  });
  return coefficients;
}

}  // namespace pcka
