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
// factors of dZ already obey, so its adjoint needs no pass of its own. All chunks work in the same
// buffers, which are small enough to stay in a cache.
//
// The products of bfloat16 maps are those of bfloat16 rows where the processor has instructions
// for them, accumulated in float32. Rows are centered in float32 before they are rounded. `cka`,
// whose inputs are small, computes in float32.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "cpu/platform.h"
#include "dtypes.h"
#include "geometry.h"
#include "library.h"

namespace pcka {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kChunkBytesThread = int64_t{1} << 21;  // on the CPU, for each thread
constexpr int64_t kChunkBytesAccelerator = int64_t{1} << 28;

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Buffers that one chunk of groups leaves to the next, by what they hold.
class Buffers {
 public:
  enum Slot { kX, kY, kGradX, kGradY, kGramX, kGramY, kCross, kTermsX, kTermsY, kSlots };

  // (groups, rows, columns) on the device of `like`. A later request of a slot is of no more
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

struct Rows {
  Tensor values;  // (G, N, D)
  Tensor energy;  // (G, 2)
};

// bfloat16 rows for a bfloat16 map, where products of them are fast.
ScalarType rows_dtype(const Tensor& map) {
  const ScalarType dtype = map.scalar_type();
  const bool rounded =
      dtype == ScalarType::BFloat16 && (!map.is_cpu() || cpu_multiplies_bfloat16());
  return rounded ? dtype : accumulation_dtype(dtype);
}

// Grams of bfloat16 rows are float32 where the product can write them so.
ScalarType gram_dtype(const Tensor& rows) {
  return rows.is_cpu() ? rows.scalar_type() : accumulation_dtype(rows.scalar_type());
}

void call_patchify(
    const Rows& rows, const Tensor& input, int64_t patch_h, int64_t patch_w, int64_t group_by,
    int64_t center) {
  std::array<StableIValue, 7> stack{from(rows.values), from(rows.energy), from(input),
                                    from(patch_h),     from(patch_w),     from(group_by),
                                    from(center)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(PCKA_OPERATOR("patchify_"), "", stack.data(), TORCH_ABI_VERSION));
}

void call_patchify_backward(
    const Tensor& grad_input, const Tensor& grad_rows, int64_t patch_h, int64_t patch_w,
    int64_t group_by) {
  std::array<StableIValue, 5> stack{
      from(grad_input), from(grad_rows), from(patch_h), from(patch_w), from(group_by)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      PCKA_OPERATOR("patchify_backward_"), "", stack.data(), TORCH_ABI_VERSION));
}

// out = a b, batched. The out= variants on purpose: autocast leaves them alone, while under
// autocast a plain bmm would silently round its operands to bfloat16.
Tensor multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The same values in `dtype`.
Tensor cast(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor result = torch::stable::new_empty(x, x.sizes(), dtype);
  return torch::stable::copy_(result, x);
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 1, 2); }

struct Aligned {
  Tensor alignment;                      // (G)
  std::optional<Tensor> grad_x, grad_y;  // (G, N, D) of X and Y, where asked for
};

// X (G, N, D_x), Y (G, N, D_y). The gradient by x may be written over Y where Y is done with.
Aligned align(
    const Rows& rows_x, const Rows& rows_y, bool columns, bool center, bool needs_grad_x,
    bool needs_grad_y, Buffers& buffers) {
  const Tensor &x = rows_x.values, &y = rows_y.values;
  const int64_t groups = x.size(0), n = x.size(1), d_x = x.size(2), d_y = y.size(2);
  const int64_t d = std::max(d_x, d_y);
  // Products of 2 m m k operations each: 3 (direct) against 5 (cross, forward and gradient).
  const bool direct = columns ? 3 * d < 5 * n : 3 * n <= 5 * d;
  const bool of_columns = columns == direct;  // the matrices formed: A' B (D x D), else A B'

  const Tensor z = of_columns ? transposed(x) : x, w = of_columns ? transposed(y) : y;
  const auto gram = [&](Buffers::Slot slot, const Tensor& a, const Tensor& b) {
    const Tensor out = buffers.get(slot, x, groups, a.size(1), b.size(1), gram_dtype(x));
    return multiply(out, a, transposed(b));
  };
  const Tensor k = gram(Buffers::kGramX, z, z), l = gram(Buffers::kGramY, w, w);
  std::optional<Tensor> cross;
  if (!direct) cross = gram(Buffers::kCross, z, w);

  std::array<StableIValue, 6> stack{
      from(k), from(l), from(cross), from(rows_x.energy), from(rows_y.energy), from(center)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(PCKA_OPERATOR("gram_alignment"), "", stack.data(), TORCH_ABI_VERSION));
  Aligned result{to<Tensor>(stack[0]), std::nullopt, std::nullopt};
  const Tensor coefficients = to<Tensor>(stack[1]);
  if (!needs_grad_x && !needs_grad_y) return result;

  std::array<StableIValue, 4> factors{from(k), from(l), from(cross), from(coefficients)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      PCKA_OPERATOR("alignment_gradient_"), "", factors.data(), TORCH_ABI_VERSION));
  // dX = K X + M Y, or X K + Y M' by the columns, of the factors that now stand in K and M.
  const auto apply = [&](const Tensor& out, const Tensor& factor, const Tensor& rows) {
    const Tensor rounded = cast(factor, rows.scalar_type());
    return of_columns ? multiply(out, rows, rounded) : multiply(out, rounded, rows);
  };
  const auto gradient = [&](Tensor out, Buffers::Slot slot, const Tensor& own, const Tensor& rows,
                            const Tensor& mixed, const Tensor& other) {
    if (direct) return apply(out, own, rows);
    Tensor terms = buffers.get(slot, out, 2 * groups, n, out.size(2), out.scalar_type());
    apply(torch::stable::narrow(terms, 0, 0, groups), own, rows);
    apply(torch::stable::narrow(terms, 0, groups, groups), mixed, other);
    const int64_t dim = 0;
    return torch::stable::sum_out(
        out, torch::stable::view(terms, {2, groups, n, out.size(2)}), Sizes(&dim, 1));
  };
  const Tensor mixed = direct ? k : *cross, mixed_back = transposed(mixed);
  if (needs_grad_x) {
    const Tensor out = !needs_grad_y && d_x == d_y
                           ? y
                           : buffers.get(Buffers::kGradX, x, groups, n, d_x, x.scalar_type());
    result.grad_x = gradient(out, Buffers::kTermsX, k, x, of_columns ? mixed_back : mixed, y);
  }
  if (needs_grad_y) {
    const Tensor out = buffers.get(Buffers::kGradY, y, groups, n, d_y, y.scalar_type());
    result.grad_y = gradient(out, Buffers::kTermsY, l, y, of_columns ? mixed : mixed_back, x);
  }
  return result;
}

std::tuple<Tensor, Tensor> patchify(
    const Tensor& input,  // (B, C, H, W), any strides
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, ScalarType dtype) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by);
  const Rows rows{
      torch::stable::new_empty(input, {g.groups, g.rows, g.columns}, dtype),
      torch::stable::new_empty(input, {g.groups, 2}, ScalarType::Double)};
  call_patchify(rows, input, patch_h, patch_w, group_by, center);
  return {rows.values, rows.energy};
}

std::tuple<Tensor, Tensor, Tensor> cka(
    const Tensor& x,  // (G, N, D_x)
    const Tensor& y,  // (G, N, D_y)
    bool center, bool needs_grad_x, bool needs_grad_y) {
  STD_TORCH_CHECK(
      x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(1) == y.size(1),
      "x and y must be (G, N, D_x) and (G, N, D_y)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have one dtype");
  // (G, N, D) as G maps of D channels and N pixels, in patches of one pixel.
  const auto rows = [&](const Tensor& t) {
    const auto [values, energy] = patchify(
        torch::stable::unsqueeze(transposed(t), 3), 1, 1, kBatch, center ? kOverRows : kNone,
        accumulation_dtype(t.scalar_type()));
    return Rows{values, energy};
  };
  Buffers buffers;
  const Aligned aligned =
      align(rows(x), rows(y), false, center, needs_grad_x, needs_grad_y, buffers);
  const auto output = [](const std::optional<Tensor>& grad, const Tensor& input) {
    return grad ? cast(*grad, gradient_dtype(input.scalar_type()))
                : torch::stable::new_empty(input, {0});
  };
  return {aligned.alignment, output(aligned.grad_x, x), output(aligned.grad_y, y)};
}

// Groups that are worked on together, so that their rows and Grams fit the cache or a bounded
// buffer, and every thread has some.
int64_t chunk_groups(const PatchGeometry& g, const Tensor& student, ScalarType dtype) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = student.is_cpu() ? kChunkBytesThread * threads : kChunkBytesAccelerator;
  const int64_t per_group =
      (dtype == ScalarType::BFloat16 ? 2 : 4) * 2 * (g.rows * g.columns + g.rows * g.rows);
  return std::clamp<int64_t>(bytes / per_group, 1, g.groups);
}

// Fresh memory for a map's gradient, in the map's own layout.
Tensor new_gradient(const Tensor& map) {
  const ScalarType dtype = gradient_dtype(map.scalar_type());
  return dtype == map.scalar_type() ? torch::stable::empty_like(map)
                                    : torch::stable::new_empty(map, map.sizes(), dtype);
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
  const bool by_position = group_by == kPosition;
  const ScalarType dtype = by_position || centering == kOverColumns
                               ? accumulation_dtype(student.scalar_type())
                               : rows_dtype(student);
  Buffers buffers;
  const auto align_maps = [&](const Tensor& s, const Tensor& t, int64_t groups) {
    const auto rows = [&](const Tensor& map, Buffers::Slot slot) {
      const Rows result{
          buffers.get(slot, map, groups, g.rows, g.columns, dtype),
          torch::stable::new_empty(map, {groups, 2}, ScalarType::Double)};
      call_patchify(result, map, patch_h, patch_w, group_by, centering);
      return result;
    };
    return align(
        rows(s, Buffers::kX), rows(t, Buffers::kY), columns, center, needs_grad, false, buffers);
  };
  const Tensor none = torch::stable::new_empty(student, {0});
  if (by_position) {
    // Every source pixel belongs to several groups, so the map cannot be cut.
    const Aligned aligned = align_maps(student, teacher, g.groups);
    return {aligned.alignment, needs_grad ? *aligned.grad_x : none};
  }

  Tensor alignment =
      torch::stable::new_empty(student, {g.groups}, accumulation_dtype(student.scalar_type()));
  const Tensor gradient = needs_grad ? new_gradient(student) : none;
  const int64_t dim = group_by == kChannel ? 1 : 0;  // of the map, that the groups lie along
  const int64_t step = chunk_groups(g, student, dtype);
  for (int64_t first = 0; first < g.groups; first += step) {
    const int64_t count = std::min(step, g.groups - first);
    const auto chunk = [&](Tensor map) { return torch::stable::narrow(map, dim, first, count); };
    const Aligned aligned = align_maps(chunk(student), chunk(teacher), count);
    Tensor part = torch::stable::narrow(alignment, 0, first, count);
    torch::stable::copy_(part, aligned.alignment);
    if (needs_grad) {
      call_patchify_backward(chunk(gradient), *aligned.grad_x, patch_h, patch_w, group_by);
    }
  }
  return {alignment, gradient};
}

}  // namespace

PCKA_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("cka", TORCH_BOX(&cka));
  m.impl("patch_cka", TORCH_BOX(&patch_cka));
}

}  // namespace pcka
