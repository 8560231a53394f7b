// A gradient times one factor per group, on the CPU.

#include "../scale_groups.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../library.h"
#include "lines.h"

namespace pcka {
namespace {

constexpr int64_t kPiece = 1024;   // values processed together
constexpr int64_t kShortRun = 16;  // shorter runs of a group are processed with the others'

// out = factors * gradient for a run, with one factor for all of it or one per value.
template <typename gradient_t, typename out_t, typename acc_t>
void scale_run(
    const gradient_t* gradient, int64_t count, const acc_t* factors, bool one_factor, out_t* out) {
  acc_t line[kPiece];
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t there = std::min(kPiece, count - first);
    convert(gradient + first, there, line);
    const acc_t* factor = factors + (one_factor ? 0 : first);
    if (one_factor) {
      for (int64_t i = 0; i < there; ++i) line[i] *= *factor;
    } else {
      for (int64_t i = 0; i < there; ++i) line[i] *= factor[i];
    }
    convert(line, there, out + first);
  }
}

struct Cpu {
  template <typename gradient_t, typename out_t>
  static void run(const ScaleGroups<gradient_t, out_t>& job, const Tensor&) {
    using acc_t = acc_type<gradient_t>;
    const GroupedMemory& m = job.memory;
    // Runs of one group, or, if those are short, of all groups with a factor per value.
    const bool short_runs = m.stride < kShortRun;
    std::vector<acc_t> of_values(short_runs ? m.groups * m.stride : 0);
    for (std::size_t i = 0; i < of_values.size(); ++i) of_values[i] = job.factors[i / m.stride];
    const int64_t length = short_runs ? m.groups * m.stride : m.stride;
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / length);
    torch::stable::parallel_for(0, m.count / length, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const acc_t* of_run = short_runs ? of_values.data() : job.factors + i % m.groups;
        const int64_t at = i * length;
        scale_run(job.gradient + at, length, of_run, !short_runs, job.out + at);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) { m.impl("scale_groups_", TORCH_BOX(&scale_groups<Cpu>)); }

}  // namespace pcka
