// The adjoint of patchify on the CPU: put the patches back, adjoint of the resize.
//
// The forward pass in reverse (see patchify.cpp): lines of the resized map are read from the rows
// and added to the source lines they were blended from, and each of those is then resized back.

#include "../patchify_backward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../library.h"
#include "channel_blocks.h"
#include "lines.h"
#include "resample.h"

namespace pcka {
namespace {

// What all threads share for one map.
template <typename scalar_t, typename acc_t, typename rows_t>
struct Job : PatchifyBackward<scalar_t, rows_t> {
  ResamplingAdjoint<acc_t> across;
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
        patches_(g_.patch_h * width_),
        resized_(together * width_),
        lines_(together * g_.height * width_),
        source_(together * padded(g_.width)) {}

  // Adds every line of the resized map to the source lines that it was blended from.
  void load(const ChannelBlock& block) {
    std::fill(lines_.begin(), lines_.end(), 0);
    const rows_t* rows = job_.rows + block.b * g_.stride_b + block.c * g_.stride_c;
    for (int64_t ny = 0; ny < g_.n_h; ++ny) {
      const rows_t* row = rows + ny * g_.stride_ny;
      if (g_.stride_px != 1) {
        load_pixels(row, ny, block.count);
        continue;
      }
      for (int64_t k = 0; k < block.count; ++k) load_patches(row + k * g_.stride_c, ny, k);
    }
  }

  void store(const ChannelBlock& block) {
    scalar_t* image = job_.grad_input + block.b * job_.out.b + block.c * job_.out.c;
    for (int64_t y = 0; y < g_.height; ++y) {
      for (int64_t k = 0; k < block.count; ++k) {
        job_.across(
            lines_.data() + (k * g_.height + y) * width_, source_.data() + k * padded(g_.width));
      }
      store_line(image + y * job_.out.y, block.count);
    }
  }

 private:
  // Adds one row of patches of channel k, patch by patch, if a patch is contiguous in the rows.
  void load_patches(const rows_t* row, int64_t ny, int64_t k) {
    with_fixed_length(g_.patch_w, [&](auto length) {
      patches_to_lines(row, g_.stride_nx, g_.patch_h, g_.n_w, length, width_, patches_.data());
    });
    for (int64_t py = 0; py < g_.patch_h; ++py) {
      const rows_t* line = patches_.data() + py * width_;
      if constexpr (std::is_same_v<rows_t, acc_t>) {
        scatter(line, ny * g_.patch_h + py, k);
      } else {
        convert(line, g_.resized_w, resized_.data());
        scatter(resized_.data(), ny * g_.patch_h + py, k);
      }
    }
  }

  // The same for all channels, if the channels of a pixel are neighbours in the rows.
  void load_pixels(const rows_t* row, int64_t ny, int64_t count) {
    for (int64_t py = 0; py < g_.patch_h; ++py) {
      for (int64_t x = 0; x < g_.resized_w; ++x) {
        const rows_t* pixel =
            row + py * g_.stride_py + x / g_.patch_w * g_.stride_nx + x % g_.patch_w * g_.stride_px;
        for (int64_t k = 0; k < count; ++k) {
          resized_[k * width_ + x] = static_cast<acc_t>(pixel[k * g_.stride_c]);
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        scatter(resized_.data() + k * width_, ny * g_.patch_h + py, k);
      }
    }
  }

  // Adds line y of the resized map, of channel k, to its source lines.
  void scatter(const acc_t* line, int64_t y, int64_t k) {
    const Tap<acc_t>& tap = job_.down[y];
    acc_t* lines = lines_.data() + k * g_.height * width_;
    scatter_blend(
        line, tap.weight, g_.resized_w, lines + tap.low * width_, lines + tap.high * width_);
  }

  void store_line(scalar_t* line, int64_t count) const {
    if (job_.out.x == 1) {
      for (int64_t k = 0; k < count; ++k) {
        convert(source_.data() + k * padded(g_.width), g_.width, line + k * job_.out.c);
      }
      return;
    }
    for (int64_t x = 0; x < g_.width; ++x) {
      for (int64_t k = 0; k < count; ++k) {
        line[x * job_.out.x + k * job_.out.c] =
            static_cast<scalar_t>(source_[k * padded(g_.width) + x]);
      }
    }
  }

  const Job<scalar_t, acc_t, rows_t>& job_;
  const PatchGeometry& g_;
  const int64_t width_;    // of a resized line in memory
  Lines<rows_t> patches_;  // (patch_h, resized W): a row of patches
  Lines<acc_t> resized_;   // (together, resized W): one line of the resized map
  Lines<acc_t> lines_;     // (together, H, resized W)
  Lines<acc_t> source_;    // (together, W): one line of the map
};

struct Cpu {
  template <typename scalar_t, typename rows_t>
  static void run(const PatchifyBackward<scalar_t, rows_t>& b, const Tensor&) {
    using acc_t = acc_type<scalar_t>;
    const PatchGeometry& g = b.g;
    const Job<scalar_t, acc_t, rows_t> job{
        b, {g.width, g.resized_w}, make_taps<acc_t>(g.height, g.resized_h)};
    const ChannelBlocks blocks(g, b.out);
    torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
      Worker<scalar_t, acc_t, rows_t> worker(job, blocks.together());
      for (int64_t i = begin; i < end; ++i) {
        worker.load(blocks[i]);
        worker.store(blocks[i]);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) {
  m.impl("patchify_backward_", TORCH_BOX(&patchify_backward<Cpu>));
}

}  // namespace pcka
