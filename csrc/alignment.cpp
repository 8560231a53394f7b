// The operators `cka` and `patch_cka`: device-independent, built from the primitives.
//
// The alignment of two groups X (N, D_x), Y (N, D_y) is one of
//   rows:    CKA of the N x N Grams X X', Y Y'
//   columns: CKA of the D x D Grams X' X, Y' Y (that is CKA of the transposes)
// and either can be evaluated with matrices of either size (Theorem 1 of the paper:
// <X X', Y Y'> = |X' Y|^2). With Z, W the operands, (m, k) views of X and Y or of their
// transposes, there are two ways:
//   direct: K = Z Z', L = W W';               <K, L>, <K, K>, <L, L>;  dZ = 2 (a L - b K) Z
//   cross:  K = Z Z', L = W W', M = Z W';     <M, M>, <K, K>, <L, L>;  dZ = 2 (a M W - b K Z)
// Direct aligns the m x m Grams, cross the k x k ones. The cheaper of the two is taken.
//
// The gradient is computed here, in the forward pass, one chunk of groups at a time: no Gram
// outlives its chunk, and the backward pass only scales. Centering is a projection that the factors
// of dZ already obey, so its adjoint needs no pass of its own. All chunks share the same buffers,
// which are small enough to stay in a cache.
//
// For bfloat16 maps, products are of bfloat16 rows if the processor has instructions for them,
// accumulated in float32. Rows are centered in float32 before they are rounded. `cka`, whose inputs
// are small, computes in float32.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "calls.h"
#include "dtypes.h"
#include "geometry.h"
#include "library.h"
#include "patchify.h"
#include "workspace.h"

namespace pcka {
namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

struct Rows {
  Tensor values;  // (G, N, D)
  Tensor energy;  // (G, 3)
};

// The rows of two maps, possibly stored as one matrix (2 G, N, D): then one product forms both
// Grams.
struct Pair {
  Rows x, y;
  std::optional<Tensor> both;
};

// torch's narrow, on a copy of the handle, which it may change.
Tensor narrow(Tensor x, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}

Tensor half(const Tensor& both, int64_t i) {
  const int64_t groups = both.size(0) / 2;
  return narrow(both, 0, i * groups, groups);
}

// The same values in `dtype`.
Tensor cast(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor result = torch::stable::new_empty(x, x.sizes(), dtype);
  return torch::stable::copy_(result, x);
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 1, 2); }

struct Gradients {
  std::optional<Tensor> x, y;  // (G, N, D), if requested
};

// X (G, N, D_x), Y (G, N, D_y) -> alignment (G), written, and the gradients for the first `n` rows.
// With `over_y`, the one by x overwrites Y, which is no longer needed then.
Gradients align(
    const Tensor& alignment, const Pair& pair, int64_t n, bool columns, bool center,
    bool needs_grad_x, bool needs_grad_y, bool over_y, Buffers& buffers) {
  const Tensor &x = pair.x.values, &y = pair.y.values;
  const int64_t groups = x.size(0), d_x = x.size(2), d_y = y.size(2);
  const Form form = choose_form(columns, x.size(1), std::max(d_x, d_y));
  const bool direct = form.direct, of_columns = form.of_columns;
  const ScalarType gram_type = gram_dtype(x, x.scalar_type());

  const auto gram = [&](Buffers::Slot slot, const Tensor& a, const Tensor& b) {
    const Tensor p = of_columns ? transposed(a) : a, q = of_columns ? b : transposed(b);
    const Tensor out = buffers.get(slot, x, a.size(0), p.size(1), q.size(2), gram_type);
    return multiply(out, p, q);
  };
  std::optional<Tensor> both, cross;
  if (pair.both) both = gram(Buffers::kGrams, *pair.both, *pair.both);
  const Tensor k = both ? half(*both, 0) : gram(Buffers::kGramX, x, x);
  const Tensor l = both ? half(*both, 1) : gram(Buffers::kGramY, y, y);
  if (!direct) cross = gram(Buffers::kCross, x, y);

  const Tensor coefficients =
      call_gram_alignment(alignment, k, l, cross, pair.x.energy, pair.y.energy, center);
  if (!needs_grad_x && !needs_grad_y) return {};

  // In the rows' dtype, and in the Grams' own memory if that is their dtype as well.
  const auto factor = [&](bool needed, Buffers::Slot slot, const Tensor& of, bool own = true) {
    std::optional<Tensor> result;
    if (!needed) return result;
    own = own && of.scalar_type() == x.scalar_type();
    result = own ? of : buffers.get(slot, x, groups, of.size(1), of.size(2), x.scalar_type());
    return result;
  };
  Factors factors;
  factors.x = factor(needs_grad_x, Buffers::kFactorX, k);
  factors.y = factor(needs_grad_y, Buffers::kFactorY, l);
  if (!direct) {
    factors.cross_x = factor(needs_grad_x, Buffers::kCrossX, *cross);
    factors.cross_y = factor(needs_grad_y, Buffers::kCrossY, *cross, !needs_grad_x);
  }
  call_alignment_gradient(factors, k, l, cross, coefficients);

  // dX = F X + M Y, or X F + Y M' for columns, of the first n rows.
  const auto apply = [&](const Tensor& out, const Tensor& factor, const Tensor& rows) {
    return of_columns ? multiply(out, narrow(rows, 1, 0, n), factor)
                      : multiply(out, narrow(factor, 1, 0, n), rows);
  };
  const auto gradient = [&](Tensor out, Buffers::Slot slot, const Tensor& own, const Tensor& rows,
                            const std::optional<Tensor>& mixed, const Tensor& other) {
    if (!mixed) return apply(out, own, rows);
    Tensor terms = buffers.get(slot, out, 2 * groups, n, out.size(2), out.scalar_type());
    apply(half(terms, 0), own, rows);
    apply(half(terms, 1), *mixed, other);
    const int64_t dim = 0;
    return torch::stable::sum_out(
        out, torch::stable::view(terms, {2, groups, n, out.size(2)}), Sizes(&dim, 1));
  };
  const auto turned = [](const std::optional<Tensor>& factor, bool turn) {
    return turn && factor ? std::optional<Tensor>(transposed(*factor)) : factor;
  };
  Gradients result;
  if (needs_grad_x) {
    const Tensor out =
        over_y ? y : buffers.get(Buffers::kGradX, x, groups, n, d_x, x.scalar_type());
    result.x =
        gradient(out, Buffers::kTermsX, *factors.x, x, turned(factors.cross_x, of_columns), y);
  }
  if (needs_grad_y) {
    const Tensor out = buffers.get(Buffers::kGradY, y, groups, n, d_y, y.scalar_type());
    result.y =
        gradient(out, Buffers::kTermsY, *factors.y, y, turned(factors.cross_y, !of_columns), x);
  }
  return result;
}

Tensor new_energy(const Tensor& like, int64_t groups) {
  return torch::stable::new_empty(like, {groups, 3}, ScalarType::Double);
}

std::tuple<Tensor, Tensor> new_rows(
    const Tensor& input,  // (B, C, H, W), any strides
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, ScalarType dtype) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by);
  const Tensor rows = torch::stable::new_empty(input, {g.groups, g.rows, g.columns}, dtype);
  const Tensor energy = new_energy(input, g.groups);
  // Checked here too, because torch before 2.13 loses the message of an error behind the
  // dispatcher.
  check_patchify(rows, energy, input, std::nullopt, g, group_by, center);
  call_patchify(rows, energy, input, std::nullopt, patch_h, patch_w, group_by, center, false);
  return {rows, energy};
}

std::tuple<Tensor, Tensor, Tensor> cka(
    const Tensor& x,  // (G, N, D_x)
    const Tensor& y,  // (G, N, D_y)
    bool center, bool needs_grad_x, bool needs_grad_y) {
  STD_TORCH_CHECK(
      x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(1) == y.size(1),
      "x and y must be (G, N, D_x) and (G, N, D_y)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have one dtype");
  STD_TORCH_CHECK(x.numel() > 0 && y.numel() > 0, "x and y must not be empty");
  check_floating(x.scalar_type(), "x");
  check_device(y, "y", x, "x");
  const int64_t n = x.size(1), stored = padded_rows(n), centering = center ? kOverRows : kNone;
  const ScalarType dtype = accumulation_dtype(x.scalar_type());
  // (G, N, D) as G maps of D channels and N pixels, in patches of one pixel.
  const auto patchify_rows = [&](const Tensor& t, const std::optional<Tensor>& other) {
    const auto as_map = [](const Tensor& m) { return torch::stable::unsqueeze(transposed(m), 3); };
    const Tensor map = as_map(t);
    std::optional<Tensor> second;
    if (other) second = as_map(*other);
    const int64_t groups = (other ? 2 : 1) * t.size(0);
    const Rows rows{
        torch::stable::new_empty(t, {groups, stored, t.size(2)}, dtype), new_energy(t, groups)};
    call_patchify(rows.values, rows.energy, map, second, 1, 1, kBatch, centering, true);
    return rows;
  };
  Buffers buffers;
  const auto rows = [&]() -> Pair {
    if (x.size(2) != y.size(2)) {
      return {patchify_rows(x, std::nullopt), patchify_rows(y, std::nullopt), std::nullopt};
    }
    const Rows both = patchify_rows(x, y);
    return {
        {half(both.values, 0), half(both.energy, 0)},
        {half(both.values, 1), half(both.energy, 1)},
        both.values};
  };
  const Tensor alignment = torch::stable::new_empty(x, {x.size(0)}, dtype);
  const Gradients gradients =
      align(alignment, rows(), n, false, center, needs_grad_x, needs_grad_y, false, buffers);
  const auto output = [](const std::optional<Tensor>& grad, const Tensor& input) {
    return grad ? cast(*grad, gradient_dtype(input.scalar_type()))
                : torch::stable::new_empty(input, {0});
  };
  return {alignment, output(gradients.x, x), output(gradients.y, y)};
}

// New memory for a map's gradient: in the map's layout, or contiguous if the dtypes differ.
Tensor new_gradient(const Tensor& map) {
  const ScalarType dtype = gradient_dtype(map.scalar_type());
  return dtype == map.scalar_type() ? torch::stable::empty_like(map)
                                    : torch::stable::new_empty(map, map.sizes(), dtype);
}

std::tuple<Tensor, Tensor> patch_cka(
    const Tensor& student,  // (B, C, H, W)
    const Tensor& teacher,  // (B, C, H, W)
    int64_t patch_h, int64_t patch_w, int64_t group_by, bool columns, bool center, bool needs_grad,
    int64_t workspace) {  // bytes per chunk of groups; 0: the device's default
  PatchGeometry g = make_geometry(student, "student", patch_h, patch_w, group_by);
  STD_TORCH_CHECK(
      teacher.dim() == 4 && teacher.size(0) == g.batch && teacher.size(1) == g.channels &&
          teacher.size(2) == g.height && teacher.size(3) == g.width,
      "teacher must have the student's shape (", g.batch, ", ", g.channels, ", ", g.height, ", ",
      g.width, ")");
  STD_TORCH_CHECK(
      student.scalar_type() == teacher.scalar_type(), "student and teacher must have one dtype");
  check_floating(student.scalar_type(), "student");
  check_device(teacher, "teacher", student, "student");
  const int64_t centering = !center ? kNone : columns ? kOverColumns : kOverRows;
  const ScalarType sums = accumulation_dtype(student.scalar_type());
  const Tensor alignment = torch::stable::new_empty(student, {g.groups}, sums);
  const Tensor none = torch::stable::new_empty(student, {0});
  Buffers buffers;
  if (group_by == kPosition) {
    // Every source pixel belongs to several groups: the map cannot be cut, and the gradient
    // returned is the one by the rows. It overwrites the teacher's rows, which therefore have their
    // own memory.
    const auto rows = [&](const Tensor& map) {
      const Rows result{
          torch::stable::new_empty(map, {g.groups, g.rows, g.columns}, sums),
          new_energy(map, g.groups)};
      call_patchify(
          result.values, result.energy, map, std::nullopt, patch_h, patch_w, group_by, centering,
          true);
      return result;
    };
    const Pair pair{rows(student), rows(teacher), std::nullopt};
    const Gradients gradients =
        align(alignment, pair, g.rows, columns, center, needs_grad, false, true, buffers);
    return {alignment, needs_grad ? *gradients.x : none};
  }

  g.stored = padded_rows(g.rows);
  const ScalarType dtype = rows_dtype(student);
  const Tensor gradient = needs_grad ? new_gradient(student) : none;
  const int64_t dim = group_by == kChannel ? 1 : 0;  // of the map, along which the groups lie
  const int64_t step = chunk_groups(g, student, columns, centering, needs_grad, workspace);
  for (int64_t first = 0; first < g.groups; first += step) {
    const int64_t count = std::min(step, g.groups - first);
    const auto chunk = [&](const Tensor& map) { return narrow(map, dim, first, count); };
    const Tensor rows = buffers.get(Buffers::kRows, student, 2 * count, g.stored, g.columns, dtype);
    const Tensor energy = new_energy(student, 2 * count);
    call_patchify(
        rows, energy, chunk(student), chunk(teacher), patch_h, patch_w, group_by, centering, true);
    const Pair pair{{half(rows, 0), half(energy, 0)}, {half(rows, 1), half(energy, 1)}, rows};
    const Gradients gradients = align(
        narrow(alignment, 0, first, count), pair, g.stored, columns, center, needs_grad, false,
        true, buffers);
    if (needs_grad) {
      call_patchify_backward(chunk(gradient), *gradients.x, patch_h, patch_w, group_by);
    }
  }
  return {alignment, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CompositeExplicitAutograd, m) {
  m.impl("patchify", TORCH_BOX(&new_rows));
  m.impl("cka", TORCH_BOX(&cka));
  m.impl("patch_cka", TORCH_BOX(&patch_cka));
}

}  // namespace pcka
