// patchify_: argument checks and dispatch, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "dtypes.h"
#include "geometry.h"

namespace pcka {

// A kernel's arguments besides the maps.
template <typename rows_t>
struct Patchify {
  PatchGeometry g;  // of one map
  int64_t group_by, center;
  bool scale;
  rows_t* rows;    // (G, N, D), followed by those of a second map
  double* energy;  // (G, 3), likewise
};

// Checks the arguments of patchify_.
inline void check_patchify(
    const Tensor& rows, const Tensor& energy, const Tensor& input,
    const std::optional<Tensor>& second, const PatchGeometry& g, int64_t group_by, int64_t center) {
  STD_TORCH_CHECK(
      center >= kNone && center <= kOverColumns,
      "center must be 0 (none), 1 (over rows) or 2 (over columns), got ", center);
  check_floating(input.scalar_type(), "input");
  check_device(rows, "rows", input, "input");
  check_device(energy, "energy", input, "input");
  if (second.has_value()) {
    check_device(*second, "second", input, "input");
    STD_TORCH_CHECK(
        second->dim() == 4 && second->scalar_type() == input.scalar_type(),
        "second must be a map of input's dtype");
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(second->size(i) == input.size(i), "second must have input's shape");
    }
  }
  const int64_t maps = second.has_value() ? 2 : 1;
  check_rows(rows, "rows", g, input.scalar_type(), maps);
  check_table(energy, "energy", maps * g.groups, 3);
  STD_TORCH_CHECK(
      rows.scalar_type() != ScalarType::BFloat16 || group_by != kPosition,
      "rows may be bfloat16 only where they are centered before they are rounded: not by "
      "position");
}

// The operator. Device::run<scalar_t>(Patchify, input, second) does the work.
template <typename Device>
void patchify(
    const Tensor& rows,                   // (G or 2 G, N, D), contiguous; written
    const Tensor& energy,                 // (G or 2 G, 3); written
    const Tensor& input,                  // (B, C, H, W), any strides
    const std::optional<Tensor>& second,  // likewise
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, bool scale) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by, &rows);
  check_patchify(rows, energy, input, second, g, group_by, center);
  dispatch_map_and_rows(input.scalar_type(), rows.scalar_type(), "input", [&](auto map, auto row) {
    using rows_t = decltype(row);
    const Patchify<rows_t> job{
        g, group_by, center, scale, mutable_data<rows_t>(rows), mutable_data<double>(energy)};
    Device::template run<decltype(map)>(job, input, second);
  });
}

}  // namespace pcka
