// Every CUDA kernel, executed by the emulator, against the CPU operators.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "geometry.h"

namespace {

using dispatch::Patches;
using dispatch::ScalarType;
using dispatch::Tensor;

std::mt19937 generator(0);

Tensor random_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const auto device = torch::stable::Device(torch::headeronly::DeviceType::CPU);
  const Tensor wide = torch::stable::empty(sizes, ScalarType::Double, std::nullopt, device);
  std::normal_distribution<double> normal;
  double* values = static_cast<double*>(wide.mutable_data_ptr());
  for (int64_t i = 0; i < wide.numel(); ++i) values[i] = normal(generator);
  return torch::stable::to(wide, dtype);
}

// |a - b| / |b|, or max |a - b| / max |b| if that is more, as for a single wrong value; infinite
// where a value was never written.
double difference(const Tensor& a, const Tensor& b) {
  const Tensor x = torch::stable::contiguous(torch::stable::to(a, ScalarType::Double));
  const Tensor y = torch::stable::contiguous(torch::stable::to(b, ScalarType::Double));
  const double* p = static_cast<const double*>(x.const_data_ptr());
  const double* q = static_cast<const double*>(y.const_data_ptr());
  double apart = 0, size = 1e-30, farthest = 0, largest = 1e-30;
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (std::isnan(p[i]) || std::isnan(q[i])) return INFINITY;
    apart += (p[i] - q[i]) * (p[i] - q[i]);
    size += q[i] * q[i];
    farthest = std::max(farthest, std::abs(p[i] - q[i]));
    largest = std::max(largest, std::abs(q[i]));
  }
  return std::max(std::sqrt(apart / size), farthest / largest);
}

// What two roundings to the dtype may differ by.
double tolerance(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 1e-13;
    case ScalarType::Float:
      return 1e-6;
    case ScalarType::Half:
      return 2e-3;
    default:
      return 1e-2;
  }
}

enum class Layout { kPlanar, kChannelsLast, kSliced, kTransposed };

// (B, C, H, W) with the strides of a layout; sliced out of a larger map, so that neither lines nor
// the first pixel are aligned; transposed, so that neither x nor c is contiguous.
Tensor make_map(int64_t b, int64_t c, int64_t h, int64_t w, ScalarType dtype, Layout layout) {
  using torch::stable::narrow;
  using torch::stable::transpose;
  if (layout == Layout::kChannelsLast) {
    Tensor map = random_tensor({b, h, w, c}, dtype);
    return transpose(transpose(map, 2, 3), 1, 2);
  }
  if (layout == Layout::kSliced) {
    Tensor map = random_tensor({b, c, h + 1, w + 3}, dtype);
    Tensor lines = narrow(map, 2, 1, h);
    return narrow(lines, 3, 1, w);
  }
  if (layout == Layout::kTransposed) return transpose(random_tensor({b, c, w, h}, dtype), 2, 3);
  return random_tensor({b, c, h, w}, dtype);
}

struct Case {
  int64_t b, c, h, w, patch_h, patch_w;
};

// Enlarged by little, by much and not at all; one patch, one channel, one pixel; odd widths; more
// channels, patches and taps than one block's share; a matrix as `cka` passes it.
const std::vector<Case> kCases = {
    {2, 3, 9, 14, 2, 5},  {2, 2, 21, 30, 16, 16}, {1, 1, 33, 40, 8, 8},  {1, 1, 5, 7, 8, 8},
    {1, 20, 6, 9, 3, 3},  {1, 1, 1, 1, 1, 1},     {1, 2, 3, 2, 16, 16},  {2, 4, 8, 8, 4, 4},
    {1, 1, 2, 700, 1, 4}, {1, 1, 300, 3, 2, 1},   {1, 70, 9, 1, 1, 1},   {1, 1, 1, 3, 1, 600},
    {1, 2, 520, 1, 1, 1}, {1, 18, 8, 12, 8, 12},  {1, 1, 140, 12, 1, 8}, {1, 3, 90, 2, 1, 1},
    {1, 1, 3, 1, 600, 1},
};

void check_patches(const Case& s, ScalarType dtype, ScalarType rows_dtype, Layout layout) {
  for (int64_t group_by = 0; group_by < 3; ++group_by) {
    const Patches p{s.patch_h, s.patch_w, group_by};
    const pcka::PatchGeometry g =
        pcka::make_geometry(s.b, s.c, s.h, s.w, s.patch_h, s.patch_w, group_by);
    const Tensor map = make_map(s.b, s.c, s.h, s.w, dtype, layout);
    for (int64_t center = 0; center < 3; ++center) {
      const bool rounded = rows_dtype == ScalarType::BFloat16;
      if (rounded && group_by == pcka::kPosition) continue;
      // Rows of zeros after those of the map, and a second map, of another layout, in some cases.
      const int64_t maps = 1 + center % 2, stored = g.rows + (s.c % 2 == 0 ? 3 : 0);
      std::optional<Tensor> second;
      if (maps == 2) second = s.h % 2 ? map : make_map(s.b, s.c, s.h, s.w, dtype, Layout::kSliced);
      const auto rows = [&] {
        return torch::stable::new_empty(map, {maps * g.groups, stored, g.columns}, rows_dtype);
      };
      const auto energies = [&] {
        return torch::stable::new_empty(map, {maps * g.groups, 3}, ScalarType::Double);
      };
      const Tensor ours = rows(), theirs = rows(), energy = energies(), energy_there = energies();
      dispatch::patchify("pcka_emulated", ours, energy, map, second, p, center);
      dispatch::patchify("pcka", theirs, energy_there, map, second, p, center);
      CHECK(difference(ours, theirs) < tolerance(rows_dtype));
      CHECK(difference(energy, energy_there) < std::max(tolerance(rows_dtype), 1e-6));
    }
    const Tensor grad_rows = random_tensor({g.groups, g.rows, g.columns}, rows_dtype);
    const Tensor ours = make_map(s.b, s.c, s.h, s.w, dtype, layout);
    const Tensor theirs = make_map(s.b, s.c, s.h, s.w, dtype, layout);
    dispatch::patchify_backward("pcka_emulated", ours, grad_rows, p);
    dispatch::patchify_backward("pcka", theirs, grad_rows, p);
    CHECK(difference(ours, theirs) < tolerance(dtype));
  }
}

// A map's memory layout changes no bit of its rows, their energies and its gradient.
void check_layouts(const Case& s) {
  const Patches p{s.patch_h, s.patch_w, pcka::kChannel};
  const pcka::PatchGeometry g =
      pcka::make_geometry(s.b, s.c, s.h, s.w, s.patch_h, s.patch_w, p.group_by);
  const Tensor map = make_map(s.b, s.c, s.h, s.w, ScalarType::Float, Layout::kPlanar);
  const Tensor rows = torch::stable::new_empty(map, {g.groups, g.rows, g.columns});
  const Tensor energy = torch::stable::new_empty(map, {g.groups, 3}, ScalarType::Double);
  const Tensor gradient = make_map(s.b, s.c, s.h, s.w, ScalarType::Float, Layout::kPlanar);
  dispatch::patchify("pcka_emulated", rows, energy, map, std::nullopt, p, pcka::kOverRows);
  dispatch::patchify_backward("pcka_emulated", gradient, rows, p);
  for (const Layout layout : {Layout::kChannelsLast, Layout::kSliced, Layout::kTransposed}) {
    Tensor same = make_map(s.b, s.c, s.h, s.w, ScalarType::Float, layout);
    torch::stable::copy_(same, map);
    const Tensor same_rows = torch::stable::new_empty(rows, rows.sizes());
    const Tensor same_energy = torch::stable::new_empty(energy, energy.sizes());
    dispatch::patchify(
        "pcka_emulated", same_rows, same_energy, same, std::nullopt, p, pcka::kOverRows);
    dispatch::patchify_backward("pcka_emulated", same, rows, p);
    CHECK(difference(same_rows, rows) == 0);
    CHECK(difference(same_energy, energy) == 0);
    CHECK(difference(same, gradient) == 0);
  }
}

// Means far from zero are subtracted to the last digit of the values, in float32 as in float64. No
// value is rounded here but by centering, as the map is not resized.
void check_far_means() {
  const Tensor map = random_tensor({2, 3, 32, 24}, ScalarType::Float);
  float* values = static_cast<float*>(map.mutable_data_ptr());
  for (int64_t i = 0; i < map.numel(); ++i) values[i] += 1000;
  const Tensor exact = torch::stable::to(map, ScalarType::Double);
  const Patches p{8, 8, pcka::kChannel};
  for (const int64_t center : {pcka::kOverRows, pcka::kOverColumns}) {
    const pcka::PatchGeometry g = pcka::make_geometry(2, 3, 32, 24, 8, 8, pcka::kChannel);
    const Tensor ours = torch::stable::new_empty(map, {g.groups, g.rows, g.columns});
    const Tensor theirs = torch::stable::new_empty(exact, {g.groups, g.rows, g.columns});
    const Tensor energy = torch::stable::new_empty(exact, {g.groups, 3});
    dispatch::patchify("pcka", theirs, energy, exact, std::nullopt, p, center);
    dispatch::patchify("pcka_emulated", ours, energy, map, std::nullopt, p, center);
    CHECK(difference(ours, theirs) < tolerance(ScalarType::Float));
  }
}

// Groups that are too large or too small for products in their type are scaled, alike on both
// devices, and others are not.
void check_scales(ScalarType dtype, ScalarType rows_dtype, double scale) {
  const Tensor wide = random_tensor({2, 3, 18, 21}, ScalarType::Double);
  double* values = static_cast<double*>(wide.mutable_data_ptr());
  const int64_t plane = 18 * 21;
  for (int64_t i = 0; i < wide.numel(); ++i) {
    values[i] *= i / plane % 3 == 0 ? scale : i / plane % 3 == 1 ? 1 : 0;
  }
  const Tensor map = torch::stable::to(wide, dtype);
  const pcka::PatchGeometry g = pcka::make_geometry(2, 3, 18, 21, 8, 8, pcka::kChannel);
  for (int64_t center = 0; center < 3; ++center) {
    const Patches p{8, 8, pcka::kChannel};
    const auto rows = [&] {
      return torch::stable::new_empty(map, {g.groups, g.rows + 1, g.columns}, rows_dtype);
    };
    const Tensor ours = rows(), theirs = rows();
    const Tensor energy = torch::stable::new_empty(wide, {g.groups, 3});
    const Tensor energy_there = torch::stable::new_empty(wide, {g.groups, 3});
    dispatch::patchify("pcka_emulated", ours, energy, map, std::nullopt, p, center);
    dispatch::patchify("pcka", theirs, energy_there, map, std::nullopt, p, center);
    CHECK(difference(ours, theirs) < tolerance(rows_dtype));
    CHECK(difference(energy, energy_there) < std::max(tolerance(rows_dtype), 1e-6));
    const double* table = static_cast<const double*>(energy.const_data_ptr());
    CHECK(table[1] > 1 && table[1] < 1e6 && std::abs(std::log10(table[2] * scale)) < 1.5);
    CHECK(table[5] == 1 && table[7] == 0 && table[8] == 1);
  }
}

void check_grams(
    int64_t groups, int64_t n_k, int64_t n_l, bool with_cross, bool center, ScalarType dtype) {
  const auto pair = [&](int64_t height, int64_t width) {
    const Tensor a = random_tensor({groups, height, width}, dtype);
    Tensor b = torch::stable::new_empty(a, a.sizes());
    torch::stable::copy_(b, a);
    return std::array<Tensor, 2>{a, b};
  };
  const auto k = pair(n_k, n_k), l = pair(n_l, n_l), m = pair(n_k, n_l);
  const auto cross = [&](int i) { return with_cross ? std::optional<Tensor>(m[i]) : std::nullopt; };
  const Tensor energy_x = random_tensor({groups, 3}, ScalarType::Double);
  const Tensor energy_y = random_tensor({groups, 3}, ScalarType::Double);
  for (const Tensor& energy : {energy_x, energy_y}) {
    double* values = static_cast<double*>(energy.mutable_data_ptr());
    for (int64_t i = 0; i < energy.numel(); ++i) values[i] = 1 + std::abs(values[i]);
  }
  // In the Grams' own memory, and in bfloat16, of each side alone.
  const auto align = [&](const char* library, int i) {
    const Tensor alignment =
        torch::stable::new_empty(k[i], {groups}, pcka::accumulation_dtype(dtype));
    const Tensor coefficients = dispatch::gram_alignment(
        library, alignment, k[i], l[i], cross(i), energy_x, energy_y, center);
    std::vector<Tensor> results{alignment, coefficients};
    if (dtype != ScalarType::Double) {
      const auto rounded = [&](const Tensor& of) {
        results.push_back(torch::stable::new_empty(of, of.sizes(), ScalarType::BFloat16));
        return results.back();
      };
      dispatch::Factors of_x{rounded(k[i]), {}, {}, {}}, of_y{{}, rounded(l[i]), {}, {}};
      if (with_cross) of_x.cross_x = rounded(m[i]), of_y.cross_y = rounded(m[i]);
      dispatch::alignment_gradient(library, of_x, k[i], l[i], cross(i), coefficients);
      dispatch::alignment_gradient(library, of_y, k[i], l[i], cross(i), coefficients);
    }
    dispatch::Factors own{k[i], l[i], cross(i), {}};
    if (with_cross) own.cross_y = torch::stable::new_empty(m[i], m[i].sizes());
    dispatch::alignment_gradient(library, own, k[i], l[i], cross(i), coefficients);
    if (with_cross) results.push_back(*own.cross_y);
    return results;
  };
  const auto ours = align("pcka_emulated", 0), theirs = align("pcka", 1);
  CHECK(difference(ours[0], theirs[0]) < std::min(tolerance(dtype), 1e-6));
  CHECK(difference(ours[1], theirs[1]) < 1e-9);
  for (std::size_t i = 2; i < ours.size(); ++i) {
    CHECK(difference(ours[i], theirs[i]) < tolerance(ours[i].scalar_type()));
  }
  CHECK(difference(k[0], k[1]) < tolerance(dtype));
  CHECK(difference(l[0], l[1]) < tolerance(dtype));
  if (with_cross) CHECK(difference(m[0], m[1]) < tolerance(dtype));
}

// Planes, pixels and channels of odd sizes; in its own memory, and rounded to float16.
void check_scale_groups(ScalarType dtype, Layout layout, int64_t dim) {
  const Tensor gradient = make_map(3, 5, 7, 9, dtype, layout);
  const Tensor factor = random_tensor({gradient.size(dim)}, pcka::accumulation_dtype(dtype));
  const auto scaled = [&](const char* library, ScalarType to) {
    const Tensor out = torch::stable::to(torch::stable::empty_like(gradient), to);
    dispatch::scale_groups(library, out, gradient, factor, dim);
    return out;
  };
  if (dtype == ScalarType::Float) {
    const Tensor ours = scaled("pcka_emulated", ScalarType::Half);
    CHECK(difference(ours, scaled("pcka", ScalarType::Half)) == 0);
  }
  const Tensor theirs = scaled("pcka", dtype);
  dispatch::scale_groups("pcka_emulated", gradient, gradient, factor, dim);
  CHECK(difference(gradient, theirs) == 0);
}

// Of a whole operator's gradient: that of bfloat16 is rounded, that of float16 is float32.
double gradient_tolerance(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? 5 * tolerance(dtype) : 1e-4;
}

// Several kernels and products; all groups at once, or chunk by chunk, the last one smaller.
void check_patch_cka(int64_t group_by, bool columns, bool center, ScalarType dtype, Layout layout) {
  const Tensor student = make_map(2, 6, 18, 21, dtype, layout);
  const Tensor teacher = make_map(2, 6, 18, 21, dtype, layout);
  const Patches p{8, 8, group_by};
  const auto theirs = dispatch::patch_cka("pcka", student, teacher, p, columns, center);
  const double rounding = dtype == ScalarType::BFloat16 ? tolerance(dtype) : 1e-5;
  for (const int64_t workspace : {0, 1 << 16}) {
    const auto ours =
        dispatch::patch_cka("pcka_emulated", student, teacher, p, columns, center, workspace);
    CHECK(difference(ours.alignment, theirs.alignment) < rounding);
    CHECK(difference(ours.gradient, theirs.gradient) < gradient_tolerance(dtype));
  }
}

void check_cka(int64_t n, int64_t d_x, int64_t d_y, bool center, ScalarType dtype) {
  const Tensor x = random_tensor({2, n, d_x}, dtype), y = random_tensor({2, n, d_y}, dtype);
  const auto ours = dispatch::cka("pcka_emulated", x, y, center);
  const auto theirs = dispatch::cka("pcka", x, y, center);
  CHECK(difference(ours.alignment, theirs.alignment) < 1e-5);  // of float32 rows in any dtype
  CHECK(difference(ours.grad_x, theirs.grad_x) < gradient_tolerance(dtype));
  CHECK(difference(ours.grad_y, theirs.grad_y) < gradient_tolerance(dtype));
}

}  // namespace

int main() {
  const std::vector<std::array<ScalarType, 2>> dtypes = {
      {ScalarType::Double, ScalarType::Double},
      {ScalarType::BFloat16, ScalarType::Float},
      {ScalarType::BFloat16, ScalarType::BFloat16},
      {ScalarType::Half, ScalarType::Float}};
  const Layout layouts[] = {
      Layout::kPlanar, Layout::kChannelsLast, Layout::kSliced, Layout::kTransposed};
  for (const auto& [dtype, rows_dtype] : dtypes) {
    for (const Layout layout : {Layout::kPlanar, Layout::kChannelsLast, Layout::kTransposed}) {
      for (int64_t dim = 0; dim < 2; ++dim) check_scale_groups(rows_dtype, layout, dim);
    }
  }
  check_far_means();
  for (const Case& s : std::vector<Case>{
           {2, 20, 18, 35, 16, 16},
           {1, 9, 18, 35, 8, 8},
           {1, 7, 9, 30, 4, 4},
           {1, 20, 40, 3, 1, 1},
           {1, 3, 4, 300, 2, 70}}) {
    check_layouts(s);
  }
  for (const double scale : {1e-30, 1e30}) {
    check_scales(ScalarType::Float, ScalarType::Float, scale);
    check_scales(ScalarType::BFloat16, ScalarType::BFloat16, scale);
    check_scales(ScalarType::Double, ScalarType::Double, std::pow(scale, 5));
  }
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16}) {
    for (const bool center : {true, false}) {
      check_grams(3, 7, 7, false, center, dtype);
      check_grams(2, 131, 131, false, center, dtype);  // several parts
      check_grams(2, 9, 12, true, center, dtype);
      check_grams(1, 2, 2, false, center, dtype);
    }
  }
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    for (const bool center : {true, false}) {
      for (int64_t group_by = 0; group_by < 3; ++group_by) {
        check_patch_cka(group_by, false, center, dtype, layouts[group_by]);
        check_patch_cka(group_by, true, center, dtype, layouts[group_by + 1]);
      }
      check_cka(20, 7, 7, center, dtype);   // by the columns, which are fewer
      check_cka(6, 30, 11, center, dtype);  // by the rows
    }
  }
  // Every layout in float32; every other dtype in a layout that changes from case to case.
  for (std::size_t i = 0; i < kCases.size() && failures == 0; ++i) {
    for (const Layout layout : layouts) {
      check_patches(kCases[i], ScalarType::Float, ScalarType::Float, layout);
    }
    for (std::size_t j = 0; j < dtypes.size(); ++j) {
      check_patches(kCases[i], dtypes[j][0], dtypes[j][1], layouts[(i + j) % 4]);
    }
  }
  return failures != 0;
}
