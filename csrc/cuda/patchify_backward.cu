// The adjoint of patchify on CUDA: put the patches back, adjoint of the resize.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"
#include "launch.h"

namespace pcka {
namespace {

// One thread a source pixel: the sum, over the resized pixels that read it, of their gradients
// times the weights they read it with. A gather, so no atomics and one order of summation.
template <typename scalar_t, typename acc_t>
__global__ void gather_kernel(
    const acc_t* rows, PatchGeometry g, MapStrides out, scalar_t* grad_input) {
  const int64_t count = g.batch * g.channels * g.height * g.width;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t x = i % g.width, y = i / g.width % g.height;
    const int64_t plane = i / (g.width * g.height);
    const int64_t b = plane / g.channels, c = plane % g.channels;
    const Range range_y = readers(y, g.height, g.resized_h);
    const Range range_x = readers(x, g.width, g.resized_w);
    double sum = 0;
    for (int64_t oy = range_y.begin; oy < range_y.end; ++oy) {
      const double weight_y = adjoint_weight<acc_t>(y, oy, g.height, g.resized_h);
      const int64_t line = b * g.stride_b + c * g.stride_c + (oy / g.patch_h) * g.stride_ny +
                           (oy % g.patch_h) * g.stride_py;
      for (int64_t ox = range_x.begin; ox < range_x.end; ++ox) {
        const double weight = weight_y * adjoint_weight<acc_t>(x, ox, g.width, g.resized_w);
        if (weight == 0) continue;
        sum +=
            weight * rows[line + (ox / g.patch_w) * g.stride_nx + (ox % g.patch_w) * g.stride_px];
      }
    }
    grad_input[b * out.b + c * out.c + y * out.y + x * out.x] =
        static_cast<scalar_t>(static_cast<acc_t>(sum));
  }
}

void patchify_backward(
    const Tensor& grad_input,  // (B, C, H, W), any strides; written
    const Tensor& grad_rows,   // (G, N, D), contiguous
    int64_t patch_h, int64_t patch_w, int64_t group_by) {
  const PatchGeometry g = make_geometry(grad_input, "grad_input", patch_h, patch_w, group_by);
  check_rows(grad_rows, "grad_rows", g);
  check_rows_dtype(grad_rows.scalar_type(), "grad_rows", grad_input.scalar_type());
  const LaunchScope scope(grad_input);
  dispatch_floating(grad_input.scalar_type(), "grad_input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    const acc_t* rows = static_cast<const acc_t*>(grad_rows.const_data_ptr());
    gather_kernel<<<blocks_for(grad_input.numel()), kThreads, 0, scope.stream()>>>(
        rows, g, map_strides(grad_input), static_cast<scalar_t*>(grad_input.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("patchify_backward_", TORCH_BOX(&patchify_backward));
}

}  // namespace pcka
