// How a map (B, C, H, W) is cut into rows (G, N, D): sizes and strides, shared by both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "dtypes.h"

namespace pcka {

enum GroupBy : int64_t { kChannel = 0, kBatch = 1, kPosition = 2 };
enum Centering : int64_t { kNone = 0, kOverRows = 1, kOverColumns = 2 };

struct PatchGeometry {
  int64_t batch, channels, height, width;  // of the map
  int64_t patch_h, patch_w;
  int64_t n_h, n_w;               // patches down and across
  int64_t resized_h, resized_w;   // the next multiples of the patch
  int64_t groups, rows, columns;  // G, N, D
  int64_t stored;                 // rows in memory: N, followed by rows of zeros

  // Offset in (G, N, D) of resized pixel (b, c, y, x), with y = ny * patch_h + py and the same
  // for x: linear in (b, c, ny, py, nx, px).
  int64_t stride_b, stride_c, stride_ny, stride_py, stride_nx, stride_px;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline PatchGeometry make_geometry(
    int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t patch_h,
    int64_t patch_w, int64_t group_by, int64_t stored = 0) {
  STD_TORCH_CHECK(
      patch_h >= 1 && patch_w >= 1, "patch size must be positive, got ", patch_h, " x ", patch_w);
  STD_TORCH_CHECK(
      batch > 0 && channels > 0 && height > 0 && width > 0, "the map must not be empty, got (",
      batch, ", ", channels, ", ", height, ", ", width, ")");
  PatchGeometry g{};
  g.batch = batch, g.channels = channels, g.height = height, g.width = width;
  g.patch_h = patch_h, g.patch_w = patch_w;
  g.n_h = ceil_div(height, patch_h);
  g.n_w = ceil_div(width, patch_w);
  g.resized_h = g.n_h * patch_h;
  g.resized_w = g.n_w * patch_w;
  g.rows = g.n_h * g.n_w;
  g.stored = stored > g.rows ? stored : g.rows;
  const int64_t area = patch_h * patch_w;
  switch (group_by) {
    case kChannel:
      g.groups = channels, g.columns = batch * area;
      g.stride_b = area, g.stride_c = g.stored * g.columns;
      g.stride_py = patch_w, g.stride_px = 1;
      break;
    case kBatch:
      g.groups = batch, g.columns = channels * area;
      g.stride_b = g.stored * g.columns, g.stride_c = area;
      g.stride_py = patch_w, g.stride_px = 1;
      break;
    case kPosition:
      g.groups = area, g.columns = batch * channels;
      g.stride_b = channels, g.stride_c = 1;
      g.stride_py = patch_w * g.stored * g.columns, g.stride_px = g.stored * g.columns;
      break;
    default:
      STD_TORCH_CHECK(
          false, "group_by must be 0 (channel), 1 (batch) or 2 (position), got ", group_by);
  }
  g.stride_ny = g.n_w * g.columns;
  g.stride_nx = g.columns;
  return g;
}

// Rows from which the Grams of `rows` are formed: products are faster for multiples of 8, and the
// rows of zeros that pad to them change no sum.
inline int64_t padded_rows(int64_t rows) { return rows < 16 ? rows : ceil_div(rows, 8) * 8; }

// table must be a contiguous float64 (G, width).
inline void check_table(const Tensor& table, const char* name, int64_t groups, int64_t width) {
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(0) == groups && table.size(1) == width &&
          table.is_contiguous() && table.scalar_type() == ScalarType::Double,
      name, " must be a contiguous float64 tensor of shape (", groups, ", ", width, ")");
}

// The same from a map; `name` is the argument named in the error. `rows`, if given, determine how
// many rows are stored.
inline PatchGeometry make_geometry(
    const Tensor& map, const char* name, int64_t patch_h, int64_t patch_w, int64_t group_by,
    const Tensor* rows = nullptr) {
  STD_TORCH_CHECK(map.dim() == 4, name, " must be (B, C, H, W), got ", map.dim(), " dimensions");
  return make_geometry(
      map.size(0), map.size(1), map.size(2), map.size(3), patch_h, patch_w, group_by,
      rows != nullptr && rows->dim() == 3 ? rows->size(1) : 0);
}

// A map's element strides, in the order (b, c, y, x).
struct MapStrides {
  int64_t b, c, y, x;
};

inline MapStrides map_strides(const Tensor& map) {
  return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// rows must be a contiguous (G, N, D) of this geometry for each map, in a dtype for maps of dtype
// `map`; N may exceed the number of patches.
inline void check_rows(
    const Tensor& rows, const char* name, const PatchGeometry& g, ScalarType map,
    int64_t maps = 1) {
  STD_TORCH_CHECK(
      rows.dim() == 3 && rows.size(0) == maps * g.groups && rows.size(1) == g.stored &&
          rows.size(2) == g.columns && rows.is_contiguous(),
      name, " must be a contiguous tensor of shape (", maps * g.groups, ", N, ", g.columns,
      "), with at least ", g.rows, " rows");
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(
      dtype == accumulation_dtype(map) || (dtype == map && map == ScalarType::BFloat16), name,
      " must be of the dtype that sums are formed in, or bfloat16 for a bfloat16 map");
}

}  // namespace pcka
