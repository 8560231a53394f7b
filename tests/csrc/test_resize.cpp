// The integer bilinear taps against the formula in floating point, and their adjoint.

#include "resize.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace {

void check_taps(int64_t in, int64_t out) {
  for (int64_t o = 0; o < out; ++o) {
    const pcka::Tap<double> tap = pcka::bilinear_tap<double>(o, in, out);
    const double position = std::max((o + 0.5) * in / static_cast<double>(out) - 0.5, 0.0);
    CHECK(tap.low >= 0 && tap.low < in);
    CHECK(tap.high == std::min(tap.low + 1, in - 1));
    CHECK(tap.weight >= 0 && tap.weight < 1);
    CHECK(std::abs(tap.low + tap.weight - position) < 1e-12 * out);
    if (in == out) CHECK(tap.low == o && tap.weight == 0);
  }
}

// What a source index is told to gather is all that reads it, and every output's weights add up.
void check_adjoint(int64_t in, int64_t out) {
  for (int64_t o = 0; o < out; ++o) {
    double total = 0;
    for (int64_t i = 0; i < in; ++i) {
      const double weight = pcka::adjoint_weight<double>(i, o, in, out);
      const pcka::Range range = pcka::readers(i, in, out);
      if (weight != 0) CHECK(range.begin <= o && o < range.end);
      CHECK(range.begin >= 0 && range.end <= out);
      total += weight;
    }
    CHECK(std::abs(total - 1) < 1e-12);
  }
}

}  // namespace

int main() {
  for (int64_t in = 1; in <= 40; ++in) {
    for (int64_t out = in; out <= 64; ++out) {
      check_taps(in, out);
      check_adjoint(in, out);
    }
  }
  check_taps(1333, 1344);
  check_adjoint(200, 208);
  return failures != 0;
}
