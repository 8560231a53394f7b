// patchify on the CPU: bilinear resize, cut into patches, center, and the energies.
//
// A thread takes a few channels of one image at a time. It resizes their lines horizontally into
// scratch that stays in the cache, and from there blends every line of the resized map twice: once
// for the means over the patches, once to write the centered rows. Apart from the rows themselves,
// nothing as large as the map is kept.

#include "../patchify.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../library.h"
#include "centering.h"
#include "channel_blocks.h"
#include "lines.h"
#include "resample.h"

namespace pcka {
namespace {

constexpr int64_t kLinesAhead = 16;  // fetched from memory while one is processed

// What all threads share for one map.
template <typename scalar_t, typename acc_t, typename rows_t>
struct Job {
  const scalar_t* input;
  MapStrides in;
  PatchGeometry g;
  bool center;
  rows_t* rows;
  Resampling<acc_t> across;
  std::vector<Tap<acc_t>> down;
};

// One thread's work on a block of channels.
template <typename scalar_t, typename acc_t, typename rows_t>
class Worker {
 public:
  Worker(const Job<scalar_t, acc_t, rows_t>& job, int64_t together)
      : job_(job),
        g_(job.g),
        width_(padded(g_.resized_w)),
        source_(together * padded(g_.width)),
        lines_(together * g_.height * width_),
        blended_(std::max(together, g_.patch_h) * width_),
        rounded_(kRounds ? g_.patch_h * width_ : 0),
        sums_(g_.patch_h * width_),
        means_high_(g_.patch_h * width_),
        means_low_(g_.patch_h * width_) {}

  void load(const ChannelBlock& block) {
    const scalar_t* image = job_.input + block.b * job_.in.b + block.c * job_.in.c;
    for (int64_t y = 0; y < g_.height; ++y) {
      load_line(image + y * job_.in.y, block.count);
      for (int64_t k = 0; k < block.count; ++k) {
        acc_t* source = source_.data() + k * padded(g_.width);
        acc_t* line = lines_.data() + (k * g_.height + y) * width_;
        if (job_.across.identity()) {
          std::copy_n(source, g_.width, line);
        } else {
          job_.across(source, line);
        }
      }
    }
  }

  // Writes channel k of those loaded, if a patch is contiguous in the rows.
  Energy store(const ChannelBlock& block, int64_t k) {
    const acc_t* lines = lines_.data() + k * g_.height * width_;
    Energy energy;
    double squares[kLanes] = {};
    if (job_.center) energy.before = find_means(lines);
    rows_t* out = job_.rows + block.b * g_.stride_b + (block.c + k) * g_.stride_c;
    for (int64_t ny = 0; ny < g_.n_h; ++ny) {
      for (int64_t py = 0; py < g_.patch_h; ++py) blend_row(lines, ny, py, squares);
      store_patches(out + ny * g_.stride_ny);
    }
    energy.after = add_lanes(squares);
    energy.before += energy.after;
    return energy;
  }

  // Writes all loaded channels, if the channels of a pixel are neighbours in the rows; not
  // centered.
  void store_pixels(const ChannelBlock& block) {
    rows_t* out = job_.rows + block.b * g_.stride_b + block.c * g_.stride_c;
    for (int64_t y = 0; y < g_.resized_h; ++y) {
      for (int64_t k = 0; k < block.count; ++k) {
        blend_line(lines_.data() + k * g_.height * width_, y, blended_.data() + k * width_);
      }
      rows_t* line = out + y / g_.patch_h * g_.stride_ny + y % g_.patch_h * g_.stride_py;
      for (int64_t x = 0; x < g_.resized_w; ++x) {
        rows_t* pixel = line + x / g_.patch_w * g_.stride_nx + x % g_.patch_w * g_.stride_px;
        for (int64_t k = 0; k < block.count; ++k) {
          pixel[k * g_.stride_c] = static_cast<rows_t>(blended_[k * width_ + x]);
        }
      }
    }
  }

 private:
  void load_line(const scalar_t* line, int64_t count) {
    const int64_t room = padded(g_.width);
    if (job_.in.x == 1) {
      for (int64_t k = 0; k < count; ++k) {
        prefetch(line + k * job_.in.c + kLinesAhead * job_.in.y, g_.width);
        convert(line + k * job_.in.c, g_.width, source_.data() + k * room);
      }
      return;
    }
    for (int64_t x = 0; x < g_.width; ++x) {
      for (int64_t k = 0; k < count; ++k) {
        source_[k * room + x] = static_cast<acc_t>(line[x * job_.in.x + k * job_.in.c]);
      }
    }
  }

  void blend_line(const acc_t* lines, int64_t y, acc_t* out) const {
    const Tap<acc_t>& tap = job_.down[y];
    blend(lines + tap.low * width_, lines + tap.high * width_, tap.weight, g_.resized_w, out);
  }

  // The mean of every pixel of a patch over the patches, laid out as lines of the map. Returns the
  // energy that subtracting them removes.
  double find_means(const acc_t* lines) {
    std::fill(sums_.begin(), sums_.end(), 0);
    for (int64_t y = 0; y < g_.resized_h; ++y) {
      const Tap<acc_t>& tap = job_.down[y];
      add_blend(
          lines + tap.low * width_, lines + tap.high * width_, tap.weight, g_.resized_w,
          sums_.data() + y % g_.patch_h * width_);
    }
    double taken = 0;
    for (int64_t py = 0; py < g_.patch_h; ++py) {
      const int64_t at = py * width_;
      taken += spread_means(
          sums_.data() + at, g_.patch_w, g_.n_w, g_.rows, means_high_.data() + at,
          means_low_.data() + at);
    }
    return taken;
  }

  // Writes line py of the patches in row ny, centered, into the row's scratch.
  void blend_row(const acc_t* lines, int64_t ny, int64_t py, double (&squares)[kLanes]) {
    const Tap<acc_t>& tap = job_.down[ny * g_.patch_h + py];
    const acc_t *low = lines + tap.low * width_, *high = lines + tap.high * width_;
    const int64_t at = py * width_;
    acc_t* line = blended_.data() + (kRounds ? 0 : at);
    blend_centered(
        low, high, tap.weight, means_high_.data() + at, means_low_.data() + at, g_.resized_w, line,
        squares);
    if constexpr (kRounds) convert(line, g_.resized_w, rounded_.data() + at);
  }

  // Writes one row of patches, patch by patch, so that each is written from end to end.
  void store_patches(rows_t* out) const {
    const rows_t* lines;
    if constexpr (kRounds) {
      lines = rounded_.data();
    } else {
      lines = blended_.data();
    }
    with_fixed_length(g_.patch_w, [&](auto length) {
      lines_to_patches(lines, width_, g_.patch_h, g_.n_w, length, g_.stride_nx, out);
    });
  }

  static constexpr bool kRounds = !std::is_same_v<acc_t, rows_t>;

  const Job<scalar_t, acc_t, rows_t>& job_;
  const PatchGeometry& g_;
  const int64_t width_;    // of a resized line in memory
  Lines<acc_t> source_;    // (together, W): one line of the map
  Lines<acc_t> lines_;     // (together, H, resized W)
  Lines<acc_t> blended_;   // (patch_h, resized W): a row of patches, or (together, resized W)
  Lines<rows_t> rounded_;  // (patch_h, resized W), if the rows have another dtype
  Lines<double> sums_;     // (patch_h, resized W)
  Lines<acc_t> means_high_, means_low_;  // (patch_h, resized W)
};

template <typename scalar_t, typename acc_t, typename rows_t>
void fill_rows(const Job<scalar_t, acc_t, rows_t>& job, int64_t group_by, const Energies& energy) {
  const PatchGeometry& g = job.g;
  const ChannelBlocks blocks(g, job.in);
  const bool by_channel = group_by == kChannel;
  std::vector<Energy> parts(group_by == kPosition ? 0 : g.batch * g.channels);
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    Worker<scalar_t, acc_t, rows_t> worker(job, blocks.together());
    for (int64_t i = begin; i < end; ++i) {
      const ChannelBlock block = blocks[i];
      worker.load(block);
      if (group_by == kPosition) {
        worker.store_pixels(block);
        continue;
      }
      for (int64_t k = 0; k < block.count; ++k) {
        const int64_t c = block.c + k;
        parts[by_channel ? c * g.batch + block.b : block.b * g.channels + c] =
            worker.store(block, k);
      }
    }
  });
  if (group_by != kPosition) energy.set(parts);
}

template <typename scalar_t, typename rows_t>
void run_map(
    const Tensor& map, const PatchGeometry& g, int64_t group_by, int64_t center, rows_t* rows,
    const Energies& energy) {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* input = data<scalar_t>(map);
  const MapStrides in = map_strides(map);
  const bool over_rows = center == kOverRows;
  if (group_by == kBatch && g.patch_h * g.patch_w == 1 && center != kOverColumns) {
    // Patches of one pixel: the map already is a matrix.
    const Matrices<scalar_t> matrices{input, g.groups, g.rows, g.columns, g.width,
                                      in.b,  in.y,     in.x,   in.c};
    return center_matrices(matrices, over_rows, rows, g.stored, energy);
  }
  if constexpr (!std::is_same_v<acc_t, rows_t>) {
    if (center == kOverColumns) {
      // Centered before they are rounded: bfloat16 rows are made from float32 ones.
      const Tensor unrounded = torch::stable::new_empty(
          map, {g.groups, g.stored, g.columns}, accumulation_dtype(map.scalar_type()));
      acc_t* from = mutable_data<acc_t>(unrounded);
      run_map<scalar_t>(map, g, group_by, center, from, energy);
      return torch::stable::parallel_for(0, g.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = i * g.stored * g.columns;
          convert(from + at, g.rows * g.columns, rows + at);
        }
      });
    }
  }
  const bool fused = over_rows && group_by != kPosition;
  fill_rows(
      Job<scalar_t, acc_t, rows_t>{
          input,
          in,
          g,
          fused,
          rows,
          {g.width, g.resized_w},
          make_taps<acc_t>(g.height, g.resized_h)},
      group_by, energy);
  if constexpr (std::is_same_v<acc_t, rows_t>) {
    if (center == kOverColumns) {
      center_over_columns(rows, g, energy);
    } else if (group_by == kPosition) {
      const Matrices<acc_t> matrices{
          rows, g.groups, g.rows, g.columns, g.rows, g.stored * g.columns, 0, g.columns, 1};
      center_matrices(matrices, over_rows, rows, g.stored, energy);
    }
  }
}

struct Cpu {
  template <typename scalar_t, typename rows_t>
  static void run(
      const Patchify<rows_t>& job, const Tensor& input, const std::optional<Tensor>& second) {
    const PatchGeometry& g = job.g;
    const auto run_one = [&](const Tensor& map, int64_t i) {
      rows_t* rows = job.rows + i * g.groups * g.stored * g.columns;
      double* energy = job.energy + i * 3 * g.groups;
      run_map<scalar_t>(map, g, job.group_by, job.center, rows, Energies{energy, g.groups});
      clear_further_rows(rows, g);
      if (job.scale) scale_extreme_groups(rows, g, energy);
    };
    run_one(input, 0);
    if (second.has_value()) run_one(*second, 1);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) { m.impl("patchify_", TORCH_BOX(&patchify<Cpu>)); }

}  // namespace pcka
