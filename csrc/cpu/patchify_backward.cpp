// The adjoint of patchify on the CPU: put the patches back, adjoint of the resize.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"

namespace pcka {
namespace {

// One source pixel: the sum, over the resized pixels that read it, of their gradients times
// the weights they read it with. A gather, so pixels are independent of one another.
template <typename scalar_t, typename acc_t>
void gather_planes(
    const acc_t* rows, const PatchGeometry& g, MapStrides out, scalar_t* grad_input) {
  torch::stable::parallel_for(0, g.batch * g.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / g.channels, c = plane % g.channels;
      const int64_t base = b * g.stride_b + c * g.stride_c;
      for (int64_t y = 0; y < g.height; ++y) {
        const Range range_y = readers(y, g.height, g.resized_h);
        for (int64_t x = 0; x < g.width; ++x) {
          const Range range_x = readers(x, g.width, g.resized_w);
          double sum = 0;
          for (int64_t oy = range_y.begin; oy < range_y.end; ++oy) {
            const double weight_y = adjoint_weight<acc_t>(y, oy, g.height, g.resized_h);
            const int64_t line =
                base + (oy / g.patch_h) * g.stride_ny + (oy % g.patch_h) * g.stride_py;
            for (int64_t ox = range_x.begin; ox < range_x.end; ++ox) {
              const double weight = weight_y * adjoint_weight<acc_t>(x, ox, g.width, g.resized_w);
              if (weight == 0) continue;
              sum += weight *
                     rows[line + (ox / g.patch_w) * g.stride_nx + (ox % g.patch_w) * g.stride_px];
            }
          }
          grad_input[b * out.b + c * out.c + y * out.y + x * out.x] =
              static_cast<scalar_t>(static_cast<acc_t>(sum));
        }
      }
    }
  });
}

void patchify_backward(
    const Tensor& grad_input,  // (B, C, H, W), any strides; written
    const Tensor& grad_rows,   // (G, N, D), contiguous
    int64_t patch_h, int64_t patch_w, int64_t group_by) {
  const PatchGeometry g = make_geometry(grad_input, "grad_input", patch_h, patch_w, group_by);
  check_rows(grad_rows, "grad_rows", g);
  check_rows_dtype(grad_rows.scalar_type(), "grad_rows", grad_input.scalar_type());
  dispatch_floating(grad_input.scalar_type(), "grad_input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    const acc_t* rows = static_cast<const acc_t*>(grad_rows.const_data_ptr());
    gather_planes(
        rows, g, map_strides(grad_input), static_cast<scalar_t*>(grad_input.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) {
  m.impl("patchify_backward_", TORCH_BOX(&patchify_backward));
}

}  // namespace pcka
