// The adjoint of patchify on CUDA: put the patches back, adjoint of the resize.
//
// A gather: every source pixel sums the resized pixels that read it, so that the order of summation
// is fixed and there are no atomics. A thread owns some lines of one column of source pixels and
// walks over the resized lines that read them: it gathers a resized line horizontally, from the few
// pixels that read its column, whose addresses and weights it keeps, and distributes the sum over
// the two source lines that the resized line reads. A small table in shared memory tells where the
// resized lines are and what they read.

#include "../patchify_backward.h"

#include <algorithm>
#include <limits>

#include "../library.h"
#include "../resize.h"
#include "launch.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int kMaxTaps = 256;  // resized lines whose taps are held at once
constexpr int kReaders = 3;    // of a column, kept by a thread
constexpr int64_t kThreadsWanted = int64_t{1} << 18;

// How the work is divided; the same for every block. An item is a column of `lines` source pixels.
struct Tiling {
  bool channels_first;  // threads run along c, else along x
  int channels, items;  // of a block
  int lines;
  unsigned channel_blocks, item_blocks, blocks;
};

Tiling make_tiling(const MapStrides& out, const PatchGeometry& g) {
  Tiling t{};
  t.channels_first = out.c < out.x || (out.c == 1 && g.width == 1);
  t.channels = static_cast<int>(std::min<int64_t>(t.channels_first ? 16 : 1, g.channels));
  t.items = kThreads / t.channels;
  // Few lines if there are few pixels: more threads then read at once.
  const int64_t pixels = g.batch * g.channels * g.height * g.width;
  t.lines = static_cast<int>(
      std::min<int64_t>(std::clamp<int64_t>(pixels / kThreadsWanted, 4, 32), g.height));
  const int64_t items = ceil_div(g.height, t.lines) * g.width;
  const int64_t channel_blocks = ceil_div(g.channels, t.channels);
  const int64_t item_blocks = ceil_div(items, t.items);
  const int64_t blocks = g.batch * channel_blocks * item_blocks;
  STD_TORCH_CHECK(
      blocks <= std::numeric_limits<int>::max(), "grad_input has too many pixels: split it");
  t.channel_blocks = static_cast<unsigned>(channel_blocks);
  t.item_blocks = static_cast<unsigned>(item_blocks), t.blocks = static_cast<unsigned>(blocks);
  return t;
}

// Where a resized line is, and how it reads the source lines low and low + 1: one load.
template <typename acc_t>
struct alignas(16) LineTap {
  int64_t offset;
  int low;
  acc_t weight;
};

template <typename acc_t>
__device__ inline void fill_taps(LineTap<acc_t>* taps, int64_t first, int count, PatchGeometry g) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int64_t o = first + i;
    const Tap<acc_t> tap = bilinear_tap<acc_t>(o, g.height, g.resized_h);
    const unsigned line = static_cast<unsigned>(o), height = static_cast<unsigned>(g.patch_h);
    taps[i].offset = line / height * g.stride_ny + line % height * g.stride_py;
    taps[i].low = static_cast<int>(tap.low);
    taps[i].weight = tap.high == tap.low ? 0 : tap.weight;  // the last line is its own neighbour
  }
}

// The resized pixels of a line that read source pixel x.
template <typename rows_t, typename acc_t>
class Readers {
 public:
  __device__ Readers(const rows_t* rows, int64_t x, const PatchGeometry& g)
      : x_(x), first_(first_reader(x, g.width, g.resized_w)) {
    for (int j = 0; j < kReaders; ++j) {
      const bool there = first_ + j < g.resized_w;
      pixels_[j] = pixel(rows, there ? first_ + j : first_, g);
      weights_[j] = there ? weight(first_ + j, g) : acc_t(0);
      keep_in_registers(pixels_[j]);
    }
  }

  __device__ acc_t sum(int64_t offset) const {
    acc_t sum = 0;
    for (int j = 0; j < kReaders; ++j) {
      sum += weights_[j] * static_cast<acc_t>(load_constant(pixels_[j] + offset));
    }
    return sum;
  }

  // Of the readers that are not kept.
  __device__ acc_t sum_others(const rows_t* line, const PatchGeometry& g) const {
    acc_t sum = 0;
    for (int64_t o = first_ + kReaders; o < g.resized_w; ++o) {
      const acc_t w = weight(o, g);
      if (w == 0) break;
      sum += w * static_cast<acc_t>(load_constant(pixel(line, o, g)));
    }
    return sum;
  }

 private:
  __device__ static const rows_t* pixel(const rows_t* line, int64_t o, const PatchGeometry& g) {
    const unsigned at = static_cast<unsigned>(o), width = static_cast<unsigned>(g.patch_w);
    return line + at / width * g.stride_nx + at % width * g.stride_px;
  }
  __device__ acc_t weight(int64_t o, const PatchGeometry& g) const {
    return adjoint_weight<acc_t>(x_, o, g.width, g.resized_w);
  }

  int64_t x_, first_;
  const rows_t* pixels_[kReaders];
  acc_t weights_[kReaders];
};

// `many`: some column has more readers than kReaders.
template <typename scalar_t, typename rows_t, bool many>
__global__ void __launch_bounds__(
    kThreads, sizeof(scalar_t) == 8 ? 2
              : many                ? 3
                                    : 4)
    patchify_backward_kernel(
        const rows_t* __restrict__ rows, PatchGeometry g, Tiling t, MapStrides out,
        scalar_t* __restrict__ grad_input) {
  using acc_t = acc_type<scalar_t>;
  __shared__ LineTap<acc_t> taps[kMaxTaps];
  const unsigned k = t.channels_first ? threadIdx.x % t.channels : threadIdx.x / t.items;
  const unsigned item = t.channels_first ? threadIdx.x / t.channels : threadIdx.x % t.items;
  const unsigned width = static_cast<unsigned>(g.width);
  for (unsigned i = blockIdx.x; i < t.blocks; i += gridDim.x) {
    const unsigned first_item = i % t.item_blocks * t.items, j = i / t.item_blocks;
    const int64_t c = j % t.channel_blocks * t.channels + k, b = j / t.channel_blocks;
    const int64_t x = (first_item + item) % width;
    const int top = static_cast<int>((first_item + item) / width) * t.lines;
    const int bottom = static_cast<int>(min(static_cast<int64_t>(top) + t.lines, g.height));
    const bool works = top < g.height && c < g.channels && item < static_cast<unsigned>(t.items);

    // The resized lines that the block reads.
    const int64_t block_top = static_cast<int64_t>(first_item / width) * t.lines;
    const int64_t block_bottom =
        min(static_cast<int64_t>((first_item + t.items - 1) / width + 1) * t.lines, g.height);
    const int64_t begin = first_reader(block_top, g.height, g.resized_h);
    const int64_t end = min(first_reader(block_bottom + 1, g.height, g.resized_h), g.resized_h);
    const int64_t own_begin = first_reader(top, g.height, g.resized_h);
    const int64_t own_end = min(first_reader(bottom + 1, g.height, g.resized_h), g.resized_h);

    const rows_t* plane = rows + b * g.stride_b + c * g.stride_c;
    const Readers<rows_t, acc_t> readers(plane, x, g);
    int y = top - 1;               // the source line whose sum is completed next
    acc_t sum = 0, following = 0;  // of the lines y and y + 1
    scalar_t* to = grad_input + b * out.b + c * out.c + y * out.y + x * out.x;
    for (int64_t first = begin; first < end; first += kMaxTaps) {
      const int count = static_cast<int>(min(end - first, int64_t{kMaxTaps}));
      __syncthreads();  // the last taps have been read
      fill_taps(taps, first, count, g);
      __syncthreads();
      if (!works) continue;
      const int from = static_cast<int>(max(own_begin - first, int64_t{0}));
      const int until = static_cast<int>(min(own_end - first, static_cast<int64_t>(count)));
      for (int o = from; o < until; ++o) {
        const LineTap<acc_t> tap = taps[o];
        acc_t line = readers.sum(tap.offset);
        if constexpr (many) line += readers.sum_others(plane + tap.offset, g);
        if (tap.low > y) {  // by one: a map is never made smaller
          if (y >= top) *to = static_cast<scalar_t>(sum);
          ++y, to += out.y;
          sum = following, following = 0;
        }
        sum += (1 - tap.weight) * line;
        following += tap.weight * line;
      }
    }
    if (works) *to = static_cast<scalar_t>(sum);
  }
}

struct Cuda {
  template <typename scalar_t, typename rows_t>
  static void run(const PatchifyBackward<scalar_t, rows_t>& job, const Tensor& on) {
    const LaunchScope scope(on);
    const PatchGeometry& g = job.g;
    const Tiling tiling = make_tiling(job.out, g);
    const auto gather = [&](auto kernel) {
      launch(
          scope, kernel, blocks_for(tiling.blocks), job.rows, g, tiling, job.out, job.grad_input);
    };
    const bool many = 2 * g.resized_w > kReaders * g.width;  // widened by more than half
    many ? gather(patchify_backward_kernel<scalar_t, rows_t, true>)
         : gather(patchify_backward_kernel<scalar_t, rows_t, false>);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("patchify_backward_", TORCH_BOX(&patchify_backward<Cuda>));
}

}  // namespace pcka
