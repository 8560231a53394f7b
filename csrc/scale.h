// Scales that keep the Grams of very large or very small rows within their type's range. CKA does
// not depend on a group's scale; its gradient is that of the scaled rows times the scale.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"

namespace pcka {

// Whether products of rows with this |X_c|^2, and products of those, might leave the range of
// acc_t.
template <typename acc_t>
PCKA_HOST_DEVICE inline bool needs_scale(double energy) {
  constexpr double limit = sizeof(acc_t) == 8 ? 0x1p400 : 0x1p60;
  return !(energy > 1 / limit && energy < limit);
}

// The power of two that brings the largest magnitude to between 1 and 2; 1 if there is none, as for
// zeros, infinity and NaN. Multiplying by it rounds nothing.
template <typename acc_t>
PCKA_HOST_DEVICE inline acc_t scale_of(acc_t largest) {
  if (!(largest > 0 && largest <= std::numeric_limits<acc_t>::max())) return 1;
  constexpr int most = sizeof(acc_t) == 8 ? 1000 : 126;
  const int exponent = ilogb(largest);
  return static_cast<acc_t>(ldexp(
      1.0, exponent > most    ? -most
           : exponent < -most ? most
                              : -exponent));
}

}  // namespace pcka
