// patchify on CUDA: bilinear resize, cut into patches, center, and the energies.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"
#include "launch.h"

namespace pcka {
namespace {

// A weight of 0 does not read its neighbour, so that an infinity there stays where it is.
template <typename acc_t>
__device__ acc_t interpolate(acc_t low, acc_t high, acc_t weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// One thread a resized pixel, x fastest.
template <typename scalar_t, typename acc_t>
__global__ void fill_rows_kernel(
    const scalar_t* input, MapStrides in, PatchGeometry g, acc_t* rows) {
  const int64_t count = g.batch * g.channels * g.resized_h * g.resized_w;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t x = i % g.resized_w, y = i / g.resized_w % g.resized_h;
    const int64_t plane = i / (g.resized_w * g.resized_h);
    const int64_t b = plane / g.channels, c = plane % g.channels;
    const Tap<acc_t> tx = bilinear_tap<acc_t>(x, g.width, g.resized_w);
    const Tap<acc_t> ty = bilinear_tap<acc_t>(y, g.height, g.resized_h);
    const scalar_t* source = input + b * in.b + c * in.c;
    const auto read = [&](int64_t at_x) {
      return interpolate(
          static_cast<acc_t>(source[ty.low * in.y + at_x * in.x]),
          static_cast<acc_t>(source[ty.high * in.y + at_x * in.x]), ty.weight);
    };
    rows
        [b * g.stride_b + c * g.stride_c + (y / g.patch_h) * g.stride_ny +
         (y % g.patch_h) * g.stride_py + (x / g.patch_w) * g.stride_nx +
         (x % g.patch_w) * g.stride_px] = interpolate(read(tx.low), read(tx.high), tx.weight);
  }
}

// Centers one line of `length` elements, `stride` apart, and adds up its energy.
template <typename acc_t>
__device__ void center_line(
    acc_t* line, int64_t length, int64_t stride, bool center, double (&energy)[2]) {
  double sum = 0;
  for (int64_t i = 0; i < length; ++i) {
    const double value = line[i * stride];
    sum += value;
    energy[0] += value * value;
  }
  const double mean = center ? sum / static_cast<double>(length) : 0;
  for (int64_t i = 0; i < length; ++i) {
    const acc_t value = static_cast<acc_t>(line[i * stride] - mean);
    if (center) line[i * stride] = value;
    energy[1] += static_cast<double>(value) * value;
  }
}

// One block a group. A thread centers whole lines: columns (neighbouring threads on neighbouring
// columns) or rows. The energies are summed over the block in a fixed order.
template <typename acc_t>
__global__ void center_kernel(acc_t* rows, PatchGeometry g, int64_t center, double* energy) {
  const bool over_rows = center == kOverRows;
  const int64_t lines = over_rows ? g.columns : g.rows;
  const int64_t length = over_rows ? g.rows : g.columns;
  for (int64_t group = blockIdx.x; group < g.groups; group += gridDim.x) {
    acc_t* values = rows + group * g.rows * g.columns;
    double sums[2] = {0, 0};
    for (int64_t line = threadIdx.x; line < lines; line += blockDim.x) {
      center_line(
          values + line * (over_rows ? 1 : g.columns), length, over_rows ? g.columns : 1,
          center != kNone, sums);
    }
    block_sum(sums);
    if (threadIdx.x == 0) {
      energy[2 * group] = sums[0];
      energy[2 * group + 1] = sums[1];
    }
  }
}

std::tuple<Tensor, Tensor> patchify(
    const Tensor& input,  // (B, C, H, W), any strides
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, ScalarType dtype) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by);
  check_centering(center);
  check_rows_dtype(dtype, "dtype", input.scalar_type());
  const LaunchScope scope(input);
  Tensor rows = torch::stable::new_empty(
      input, {g.groups, g.rows, g.columns}, accumulation_dtype(input.scalar_type()));
  Tensor energy = torch::stable::new_empty(input, {g.groups, 2}, ScalarType::Double);
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    acc_t* values = static_cast<acc_t*>(rows.mutable_data_ptr());
    fill_rows_kernel<<<blocks_for(rows.numel()), kThreads, 0, scope.stream()>>>(
        static_cast<const scalar_t*>(input.const_data_ptr()), map_strides(input), g, values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    center_kernel<<<one_block_each(g.groups), kThreads, 0, scope.stream()>>>(
        values, g, center, static_cast<double*>(energy.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {rows, energy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace pcka
