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
// The gradient is formed here, in the forward pass, chunk of groups by chunk of groups: no Gram
// outlives its chunk, and the backward pass only scales. Centering is a projection that the
// factors of dZ already obey, so its adjoint needs no pass of its own.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "dtypes.h"
#include "geometry.h"

namespace pcka {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kChunkBytesCpu = int64_t{1} << 24;
constexpr int64_t kChunkBytesAccelerator = int64_t{1} << 28;

struct Rows {
  Tensor values;  // (G, N, D)
  Tensor energy;  // (G, 2)
};

Rows call_patchify(
    const Tensor& input, int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center) {
  std::array<StableIValue, 6> stack{from(input),   from(patch_h),
                                    from(patch_w), from(group_by),
                                    from(center),  from(accumulation_dtype(input.scalar_type()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

void call_patchify_backward(
    const Tensor& grad_input, const Tensor& grad_rows, int64_t patch_h, int64_t patch_w,
    int64_t group_by) {
  std::array<StableIValue, 5> stack{
      from(grad_input), from(grad_rows), from(patch_h), from(patch_w), from(group_by)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::patchify_backward_", "", stack.data(), TORCH_ABI_VERSION));
}

// bmm into `out`. The out= variant on purpose: autocast leaves it alone, while under autocast a
// plain bmm would silently round its operands to bfloat16.
void bmm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes back the handle that the call returned
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = torch::stable::new_empty(a, {a.size(0), a.size(1), b.size(2)});
  bmm_out(out, a, b);
  return out;
}

// a b + c d
Tensor sum_of_products(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d) {
  Tensor terms = torch::stable::new_empty(a, {2, a.size(0), a.size(1), b.size(2)});
  bmm_out(torch::stable::select(terms, 0, 0), a, b);
  bmm_out(torch::stable::select(terms, 0, 1), c, d);
  const int64_t dim = 0;
  return torch::stable::sum(terms, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 1, 2); }

struct Aligned {
  Tensor alignment;  // (G)
  // (G, N, D) of X and Y, where asked for; possibly a transposed view
  std::optional<Tensor> grad_x, grad_y;
};

Aligned align(
    const Rows& x, const Rows& y, bool columns, bool center, bool needs_grad_x, bool needs_grad_y) {
  const int64_t n = x.values.size(1);
  const int64_t d = std::max(x.values.size(2), y.values.size(2));
  // Products of 2 m m k operations each: 3 (direct) against 5 (cross, forward and gradient).
  const bool direct = columns ? 3 * d < 5 * n : 3 * n <= 5 * d;
  const bool transpose = columns == direct;
  const Tensor z = transpose ? transposed(x.values) : x.values;
  const Tensor w = transpose ? transposed(y.values) : y.values;

  const Tensor k = product(z, transposed(z)), l = product(w, transposed(w));
  std::optional<Tensor> cross;
  if (!direct) cross = product(z, transposed(w));

  std::array<StableIValue, 6> stack{from(k),        from(l),        from(cross),
                                    from(x.energy), from(y.energy), from(center)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::gram_alignment", "", stack.data(), TORCH_ABI_VERSION));
  Aligned result{to<Tensor>(stack[0]), std::nullopt, std::nullopt};
  const Tensor coefficients = to<Tensor>(stack[1]);
  if (!needs_grad_x && !needs_grad_y) return result;

  std::array<StableIValue, 4> factors{from(k), from(l), from(cross), from(coefficients)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("pcka::alignment_gradient_", "", factors.data(), TORCH_ABI_VERSION));
  if (needs_grad_x) {
    const Tensor grad = direct ? product(k, z) : sum_of_products(*cross, w, k, z);
    result.grad_x = transpose ? transposed(grad) : grad;
  }
  if (needs_grad_y) {
    const Tensor grad = direct ? product(l, w) : sum_of_products(transposed(*cross), z, l, w);
    result.grad_y = transpose ? transposed(grad) : grad;
  }
  return result;
}

// (G, N, D) in the accumulation dtype -> the dtype and values of an input of cka.
Tensor cast_like(const Tensor& grad_rows, const Tensor& input) {
  Tensor grad = torch::stable::new_empty(input, input.sizes());
  torch::stable::copy_(grad, grad_rows);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> cka(
    const Tensor& x,  // (G, N, D_x)
    const Tensor& y,  // (G, N, D_y)
    bool center, bool needs_grad_x, bool needs_grad_y) {
  STD_TORCH_CHECK(
      x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(1) == y.size(1),
      "x and y must be (G, N, D_x) and (G, N, D_y)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have one dtype");
  // (G, N, D) as G maps of one channel, N x D pixels, in patches of one row.
  const auto rows = [&](const Tensor& t) {
    return call_patchify(
        torch::stable::unsqueeze(t, 1), 1, t.size(2), kBatch, center ? kOverRows : kNone);
  };
  const Aligned aligned = align(rows(x), rows(y), false, center, needs_grad_x, needs_grad_y);
  const Tensor none = torch::stable::new_empty(x, {0});
  return {
      aligned.alignment, aligned.grad_x ? cast_like(*aligned.grad_x, x) : none,
      aligned.grad_y ? cast_like(*aligned.grad_y, y) : torch::stable::new_empty(y, {0})};
}

// Groups that are worked on together, so that their scratch fits the cache or a bounded buffer.
int64_t chunk_groups(const PatchGeometry& g, const Tensor& student) {
  // By position every source pixel belongs to several groups, so the map cannot be cut.
  const int64_t bytes = student.is_cpu() ? kChunkBytesCpu : kChunkBytesAccelerator;
  const int64_t per_group = 4 * (3 * g.rows * g.columns + 2 * g.rows * g.rows);
  return std::clamp<int64_t>(bytes / per_group, 1, g.groups);
}

std::tuple<Tensor, Tensor> patch_cka(
    const Tensor& student,  // (B, C, H, W)
    const Tensor& teacher,  // (B, C, H, W)
    int64_t patch_h, int64_t patch_w, int64_t group_by, bool columns, bool center,
    bool needs_grad) {
  const PatchGeometry g = make_geometry(student, "student", patch_h, patch_w, group_by);
  STD_TORCH_CHECK(
      teacher.dim() == 4 && teacher.size(0) == g.batch && teacher.size(1) == g.channels &&
          teacher.size(2) == g.height && teacher.size(3) == g.width,
      "teacher must have the student's shape (", g.batch, ", ", g.channels, ", ", g.height, ", ",
      g.width, ")");
  STD_TORCH_CHECK(
      student.scalar_type() == teacher.scalar_type(), "student and teacher must have one dtype");
  const int64_t centering = !center ? kNone : columns ? kOverColumns : kOverRows;
  const auto align_maps = [&](const Tensor& s, const Tensor& t) {
    return align(
        call_patchify(s, patch_h, patch_w, group_by, centering),
        call_patchify(t, patch_h, patch_w, group_by, centering), columns, center, needs_grad,
        false);
  };
  if (group_by == kPosition) {
    const Aligned aligned = align_maps(student, teacher);
    return {
        aligned.alignment, needs_grad ? torch::stable::contiguous(*aligned.grad_x)
                                      : torch::stable::new_empty(student, {0})};
  }

  Tensor alignment =
      torch::stable::new_empty(student, {g.groups}, accumulation_dtype(student.scalar_type()));
  Tensor gradient = needs_grad ? torch::stable::new_empty(student, student.sizes())
                               : torch::stable::new_empty(student, {0});
  const int64_t dim = group_by == kChannel ? 1 : 0;  // of the map, that the groups lie along
  const int64_t step = chunk_groups(g, student);
  for (int64_t first = 0; first < g.groups; first += step) {
    const int64_t count = std::min(step, g.groups - first);
    const auto chunk = [&](Tensor map) { return torch::stable::narrow(map, dim, first, count); };
    const Aligned aligned = align_maps(chunk(student), chunk(teacher));
    Tensor part = torch::stable::narrow(alignment, 0, first, count);
    torch::stable::copy_(part, aligned.alignment);
    if (needs_grad) {
      call_patchify_backward(
          chunk(gradient), torch::stable::contiguous(*aligned.grad_x), patch_h, patch_w, group_by);
    }
  }
  return {alignment, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CompositeExplicitAutograd, m) {
  m.impl("cka", TORCH_BOX(&cka));
  m.impl("patch_cka", TORCH_BOX(&patch_cka));
}

}  // namespace pcka
