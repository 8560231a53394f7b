// patchify_backward_: argument checks and dispatch, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "dtypes.h"
#include "geometry.h"

namespace pcka {

// A kernel's arguments.
template <typename scalar_t, typename rows_t>
struct PatchifyBackward {
  const rows_t* rows;  // (G, N, D)
  PatchGeometry g;
  MapStrides out;
  scalar_t* grad_input;
};

// The operator. Device::run(PatchifyBackward, a tensor on the device) does the work.
template <typename Device>
void patchify_backward(
    const Tensor& grad_input,  // (B, C, H, W), any strides; written
    const Tensor& grad_rows,   // (G, N, D), contiguous
    int64_t patch_h, int64_t patch_w, int64_t group_by) {
  const PatchGeometry g =
      make_geometry(grad_input, "grad_input", patch_h, patch_w, group_by, &grad_rows);
  check_rows(grad_rows, "grad_rows", g, grad_input.scalar_type());
  check_device(grad_rows, "grad_rows", grad_input, "grad_input");
  dispatch_map_and_rows(
      grad_input.scalar_type(), grad_rows.scalar_type(), "grad_input", [&](auto map, auto row) {
        using scalar_t = decltype(map);
        using rows_t = decltype(row);
        const PatchifyBackward<scalar_t, rows_t> job{
            data<rows_t>(grad_rows), g, map_strides(grad_input),
            mutable_data<scalar_t>(grad_input)};
        Device::run(job, grad_input);
      });
}

}  // namespace pcka
