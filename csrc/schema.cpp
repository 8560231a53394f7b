// The operators' schemas, stated once; csrc/cpu and csrc/cuda register the kernels.
//
// Symbols: G groups, N rows (samples or patches), D columns. group_by: 0 channel, 1 batch,
// 2 position. center: 0 none, 1 over the rows (each column's mean), 2 over the columns.

#include "library.h"

STABLE_TORCH_LIBRARY(pcka, m) {
  // input, second (B, C, H, W) -> rows (G, N, D), or (2 G, N, D) for both maps, and energy (G or
  // 2 G, 3), float64: |X|^2 before and after centering, and the power of two that the group was
  // multiplied by: 1, except with `scale` for groups whose Grams would leave the range of their
  // type. Rows have the accumulation dtype, or bfloat16 for a bfloat16 map. There may be more rows
  // than patches: the extra ones are zero.
  m.def(
      "patchify_(Tensor(a!) rows, Tensor(b!) energy, Tensor input, Tensor? second, int patch_h, "
      "int patch_w, int group_by, int center, bool scale) -> ()");
  // The same for one map, in new memory, without scaling.
  m.def(
      "patchify(Tensor input, int patch_h, int patch_w, int group_by, int center, "
      "ScalarType dtype) -> (Tensor rows, Tensor energy)");
  // The adjoint of an uncentered patchify, written into grad_input (B, C, H, W).
  m.def(
      "patchify_backward_(Tensor(a!) grad_input, Tensor grad_rows, int patch_h, int patch_w, "
      "int group_by) -> ()");
  // Grams -> alignment (G), coefficients (G, 4) float64 of the gradient. cross (G, N_k, N_l) is
  // given when the aligned Grams are those of the columns (see csrc/alignment.cpp).
  m.def(
      "gram_alignment_(Tensor(a!) alignment, Tensor k, Tensor l, Tensor? cross, Tensor energy_x, "
      "Tensor energy_y, bool center) -> Tensor coefficients");
  // The requested factors of the gradient: for X 2 (a L - b K), for Y 2 (a' K - c L); with cross,
  // -2 b K and 2 a M, -2 c L and 2 a' M. factor_x, factor_y and one of the others may share the
  // Grams' memory.
  m.def(
      "alignment_gradient_(Tensor(a!)? factor_x, Tensor(b!)? factor_y, Tensor(c!)? cross_x, "
      "Tensor(d!)? cross_y, Tensor k, Tensor l, Tensor? cross, Tensor coefficients) -> ()");
  // gradient times factor (G) along `dim` -> out, which may share gradient's memory, or be float16
  // for a float32 gradient. Both are dense, with the same memory layout.
  m.def("scale_groups_(Tensor(a!) out, Tensor gradient, Tensor factor, int dim) -> ()");

  // x (G, N, D_x), y (G, N, D_y) -> alignment (G) and its gradients by x and y (empty unless
  // requested; float32 for float16, which would lose what loss scaling is to preserve).
  m.def(
      "cka(Tensor x, Tensor y, bool center, bool needs_grad_x, bool needs_grad_y) "
      "-> (Tensor alignment, Tensor grad_x, Tensor grad_y)");
  // student, teacher (B, C, H, W) -> alignment (G) and its gradient by the student (empty unless
  // requested; float32 for float16): (B, C, H, W), or (G, N, D) when grouped by position, where one
  // source pixel belongs to several groups. Otherwise groups are processed in chunks of at most
  // `workspace` bytes, or of one group; 0 is the device's default.
  m.def(
      "patch_cka(Tensor student, Tensor teacher, int patch_h, int patch_w, int group_by, "
      "bool columns, bool center, bool needs_grad, int workspace=0) "
      "-> (Tensor alignment, Tensor gradient)");
}
