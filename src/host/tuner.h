// Learns which copy kernel is the faster one here and now, per size of piece.
//
// memcpy and non-temporal stores beat each other by half, depending on the processor, on the footprint and on what the
// neighbours do to the memory bus; a threshold measured on one machine is wrong on the next. So slices of large
// transfers are timed, most go the way that has been faster, and every sixteenth tries the other.
#ifndef KVLINK_HOST_TUNER_H
#define KVLINK_HOST_TUNER_H

#include <array>
#include <cstdint>
#include <mutex>

#include "copy.h"

namespace kvlink::host {

class CopyTuner {
 public:
  // How to copy the next slice, whose pieces have `piece` bytes on average.
  CopyHint choose(uint64_t piece);
  // It took this long.
  void note(uint64_t piece, CopyHint hint, uint64_t bytes, uint64_t ns);

 private:
  static constexpr uint32_t kTryEvery = 16;
  struct Bucket {
    double cost[2] = {0, 0};  // picoseconds per byte, smoothed; 0 = not known
    uint32_t turn = 0;
  };

  Bucket &bucket(uint64_t piece);

  std::mutex mutex_;
  std::array<Bucket, 6> buckets_;
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_TUNER_H
