// The channels of an image that a thread works on together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "resample.h"

namespace pcka {

// Channels [c, c + count) of image b.
struct ChannelBlock {
  int64_t b, c, count;
};

class ChannelBlocks {
 public:
  // One channel where its lines are contiguous in both the map and the rows, else as many as
  // share a cache line and fit the scratch, so that strided accesses use all that they fetch.
  ChannelBlocks(const PatchGeometry& g, MapStrides map) : g_(g) {
    if (map.x == 1 && g.stride_px == 1) return;
    const int64_t fitting = kScratchValues / (g.height * padded(g.resized_w));
    together_ = std::clamp<int64_t>(fitting, 1, std::min(kCacheLine, g.channels));
  }

  int64_t together() const { return together_; }
  int64_t size() const { return g_.batch * per_image(); }

  ChannelBlock operator[](int64_t i) const {
    const int64_t c = i % per_image() * together_;
    return {i / per_image(), c, std::min(together_, g_.channels - c)};
  }

 private:
  static constexpr int64_t kScratchValues = int64_t{1} << 18;  // of a thread's resized lines
  static constexpr int64_t kCacheLine = 16;                    // in float32 values

  int64_t per_image() const { return (g_.channels + together_ - 1) / together_; }

  const PatchGeometry& g_;
  int64_t together_ = 1;
};

}  // namespace pcka
