// alignment_gradient_: argument checks and dispatch, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>

#include "dtypes.h"
#include "geometry.h"  // check_table
#include "grams.h"
#include "host_device.h"

namespace pcka {

// to = by * coefficients[group][column] * of, for every group's `size` elements; skipped if `to` is
// null.
template <typename gram_t, typename factor_t>
struct ScaledGram {
  const gram_t* of;
  int64_t size;
  int column;
  double by;
  factor_t* to;

  PCKA_HOST_DEVICE double factor(const double* coefficients, int64_t group) const {
    return by * coefficients[4 * group + column];
  }
};

// A kernel's arguments: the Grams, the coefficients, and the requested factors; null if not
// requested. A factor may share its Gram's memory.
template <typename gram_t, typename factor_t>
struct AlignmentGradient {
  Grams<gram_t> grams;
  const double* coefficients;  // (G, 4)
  factor_t *x, *y, *cross_x, *cross_y;

  // With cross, every factor is one scaled matrix. The one that shares cross's memory comes last.
  std::array<ScaledGram<gram_t, factor_t>, 4> scaled() const {
    using Scaled = ScaledGram<gram_t, factor_t>;
    const Scaled first{grams.cross, grams.size_cross, 0, 2, cross_x};
    const Scaled second{grams.cross, grams.size_cross, 2, 2, cross_y};
    const bool x_is_own = static_cast<const void*>(cross_x) == grams.cross;
    return {
        Scaled{grams.k, grams.size_k, 1, -2, x}, Scaled{grams.l, grams.size_l, 3, -2, y},
        x_is_own ? second : first, x_is_own ? first : second};
  }
};

// Checks the arguments of alignment_gradient_: requested factors have the sizes of k, l, cross and
// cross. Returns their common dtype, or that of the Grams if there are none.
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
    STD_TORCH_CHECK(i < 2 || cross.has_value(), kNames[i], " requires `cross`");
    const Tensor &factor = **factors[i], &of = i == 0 ? k : i == 1 ? l : *cross;
    if (!dtype) dtype = factor.scalar_type();
    check_device(factor, kNames[i], k, "k");
    STD_TORCH_CHECK(
        factor.dim() == 3 && factor.size(0) == of.size(0) && factor.size(1) == of.size(1) &&
            factor.size(2) == of.size(2) && factor.is_contiguous() &&
            factor.scalar_type() == *dtype,
        kNames[i], " must be a contiguous tensor of shape (", of.size(0), ", ", of.size(1), ", ",
        of.size(2), ") of the factors' dtype");
  }
  return dtype ? *dtype : k.scalar_type();
}

// The operator. Device::run(AlignmentGradient, a tensor on the device) does the work.
template <typename Device>
void alignment_gradient(
    const std::optional<Tensor>& factor_x,  // (G, N_k, N_k); written
    const std::optional<Tensor>& factor_y,  // (G, N_l, N_l); written
    const std::optional<Tensor>& cross_x,   // (G, N_k, N_l); written
    const std::optional<Tensor>& cross_y,   // (G, N_k, N_l); written
    const Tensor& k,                        // (G, N_k, N_k)
    const Tensor& l,                        // (G, N_l, N_l)
    const std::optional<Tensor>& cross,     // (G, N_k, N_l)
    const Tensor& coefficients) {           // (G, 4)
  const ScalarType dtype = check_alignment_gradient(
      {&factor_x, &factor_y, &cross_x, &cross_y}, k, l, cross, coefficients);
  dispatch_gram_and_factor(k.scalar_type(), dtype, [&](auto gram, auto factor) {
    using gram_t = decltype(gram);
    using factor_t = decltype(factor);
    const AlignmentGradient<gram_t, factor_t> job{
        make_grams<gram_t>(k, l, cross),  data<double>(coefficients),
        mutable_data<factor_t>(factor_x), mutable_data<factor_t>(factor_y),
        mutable_data<factor_t>(cross_x),  mutable_data<factor_t>(cross_y)};
    Device::run(job, k);
  });
}

}  // namespace pcka
