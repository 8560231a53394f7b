// The memory that chunks of groups share, and how many groups make a chunk.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "cpu/platform.h"
#include "dtypes.h"
#include "geometry.h"

namespace pcka {

// bfloat16 rows for a bfloat16 map, if products of them are fast.
inline ScalarType rows_dtype(const Tensor& map) {
  const ScalarType dtype = map.scalar_type();
  const bool rounded =
      dtype == ScalarType::BFloat16 && (!map.is_cpu() || cpu_multiplies_bfloat16());
  return rounded ? dtype : accumulation_dtype(dtype);
}

// Grams of bfloat16 rows are float32 if the product can write float32.
inline ScalarType gram_dtype(const Tensor& like, ScalarType rows) {
  return like.is_cpu() ? rows : accumulation_dtype(rows);
}

// Which matrices two groups are aligned by (see alignment.cpp).
struct Form {
  bool direct;
  bool of_columns;  // A' B (D x D), else A B' (N x N)
};

// The cheaper one: direct takes 3 products of 2 m m k operations each, cross 5.
inline Form choose_form(bool columns, int64_t n, int64_t d) {
  const bool direct = columns ? 3 * d < 5 * n : 3 * n <= 5 * d;
  return {direct, columns == direct};
}

// Buffers that chunks of groups reuse, by what they hold.
class [[gnu::visibility("hidden")]] Buffers {  // like its members
 public:
  enum Slot {
    kRows,
    kGramX,
    kGramY,
    kGrams,
    kCross,
    kFactorX,
    kFactorY,
    kCrossX,
    kCrossY,
    kTermsX,
    kTermsY,
    kGradX,
    kGradY,
    kSlots
  };

  // (groups, rows, columns) on the device of `like`. Later requests for a slot must not have more
  // groups.
  Tensor get(
      Slot slot, const Tensor& like, int64_t groups, int64_t rows, int64_t columns,
      ScalarType dtype) {
    std::optional<Tensor>& buffer = slots_[slot];
    if (!buffer) buffer = torch::stable::new_empty(like, {groups, rows, columns}, dtype);
    return buffer->size(0) == groups ? *buffer : torch::stable::narrow(*buffer, 0, 0, groups);
  }

 private:
  std::array<std::optional<Tensor>, kSlots> slots_;
};

// Bytes that patch_cka allocates per group of a chunk.
inline int64_t bytes_per_group(
    const PatchGeometry& g, const Tensor& map, bool columns, int64_t centering, bool needs_grad) {
  const ScalarType rows = rows_dtype(map), gram = gram_dtype(map, rows);
  const Form form = choose_form(columns, g.stored, g.columns);
  const int64_t values = g.stored * g.columns, side = form.of_columns ? g.columns : g.stored;
  const int64_t square = side * side, grams = form.direct ? 2 : 3;
  const ScalarType sums = accumulation_dtype(rows);
  const bool over_columns = centering == kOverColumns;
  int64_t work = grams * square * size_of(gram);
  if (needs_grad) {
    // Factors share the Grams' memory if the dtypes match; the gradient overwrites the teacher's
    // rows, and with cross it is the sum of two terms.
    if (gram != rows) work += (grams - 1) * square * size_of(rows);
    if (!form.direct) work += 2 * values * size_of(rows);
  }
  if (over_columns && rows != sums) {
    // Rows before they are centered and rounded: on a CPU, those of one map.
    work += (map.is_cpu() ? 1 : 2) * values * size_of(sums);
  }
  // The energies of both maps and the coefficients, and an upper bound on a GPU's partial energies.
  int64_t table = 2 * 3 + 4;
  if (!map.is_cpu()) table += 2 * 2 * std::max(g.columns, over_columns ? g.stored : 0);
  return 2 * values * size_of(rows) + work + table * size_of(ScalarType::Double);
}

// Number of groups processed together: as many as `workspace` bytes hold, at least one. Without a
// workspace: on a CPU what stays in each thread's cache, else 256 MiB.
inline int64_t chunk_groups(
    const PatchGeometry& g, const Tensor& map, bool columns, int64_t centering, bool needs_grad,
    int64_t workspace) {
  if (workspace <= 0) {
    workspace =
        map.is_cpu() ? (int64_t{2} << 20) * torch::stable::get_num_threads() : int64_t{256} << 20;
  }
  const int64_t per_group = bytes_per_group(g, map, columns, centering, needs_grad);
  return std::clamp<int64_t>(workspace / per_group, 1, g.groups);
}

}  // namespace pcka
