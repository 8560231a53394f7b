// Pairs of Grams, as taken by both operators on them; shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "dtypes.h"

namespace pcka {

// The matrices of all groups. cross may be null: then l has as many elements as k.
template <typename gram_t>
struct Grams {
  const gram_t *k, *l, *cross;
  int64_t groups;
  int64_t size_k, size_l, size_cross;  // elements per group
};

// k (G, N_k, N_k), l (G, N_l, N_l), cross (G, N_k, N_l): contiguous, one dtype. Without cross, the
// Grams must have one size.
inline void check_grams(const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross) {
  const auto square = [](const Tensor& m) {
    return m.dim() == 3 && m.size(1) == m.size(2) && m.is_contiguous();
  };
  STD_TORCH_CHECK(square(k), "k must be a contiguous tensor of shape (G, N, N)");
  STD_TORCH_CHECK(
      square(l) && l.size(0) == k.size(0), "l must be a contiguous tensor of shape (G, N, N)");
  STD_TORCH_CHECK(k.scalar_type() == l.scalar_type(), "k and l must have one dtype");
  check_device(l, "l", k, "k");
  if (cross.has_value()) check_device(*cross, "cross", k, "k");
  if (cross.has_value()) {
    STD_TORCH_CHECK(
        cross->dim() == 3 && cross->size(0) == k.size(0) && cross->size(1) == k.size(1) &&
            cross->size(2) == l.size(1) && cross->is_contiguous() &&
            cross->scalar_type() == k.scalar_type(),
        "cross must be a contiguous tensor of shape (", k.size(0), ", ", k.size(1), ", ", l.size(1),
        ") of k's dtype");
  } else {
    STD_TORCH_CHECK(
        k.size(1) == l.size(1), "without cross, k and l must have one size, got ", k.size(1),
        " and ", l.size(1));
  }
}

// From tensors that check_grams accepts.
template <typename gram_t>
Grams<gram_t> make_grams(const Tensor& k, const Tensor& l, const std::optional<Tensor>& cross) {
  const auto size = [](const Tensor& m) { return m.size(1) * m.size(2); };
  return {
      data<gram_t>(k),
      data<gram_t>(l),
      data<gram_t>(cross),
      k.size(0),
      size(k),
      size(l),
      cross.has_value() ? size(*cross) : 0};
}

}  // namespace pcka
