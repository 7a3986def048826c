#include "tuner.h"

#include <algorithm>

namespace kvlink::host {
namespace {

constexpr double kSmoothing = 0.125;
constexpr double kOutlier = 2;  // a slice that was interrupted says nothing about the kernel

}  // namespace

CopyTuner::Bucket &CopyTuner::bucket(uint64_t piece) {
  size_t index = 0;  // up to 2 KiB, 8 KiB, 32 KiB, 128 KiB, 512 KiB, more
  for (uint64_t limit = 2048; index + 1 < buckets_.size() && piece > limit; limit *= 4) ++index;
  return buckets_[index];
}

CopyHint CopyTuner::choose(uint64_t piece) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Bucket &item = bucket(piece);
  const bool streaming = item.cost[1] < item.cost[0];  // an unknown cost is 0 and so is tried first
  const bool other = ++item.turn % kTryEvery == 0;
  return streaming != other ? CopyHint::kStreaming : CopyHint::kCached;
}

void CopyTuner::note(uint64_t piece, CopyHint hint, uint64_t bytes, uint64_t ns) {
  if (bytes == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  double &cost = bucket(piece).cost[hint == CopyHint::kStreaming ? 1 : 0];
  const double sample = static_cast<double>(ns) * 1000 / static_cast<double>(bytes);
  cost = cost == 0 ? sample : cost + kSmoothing * (std::min(sample, kOutlier * cost) - cost);
}

}  // namespace kvlink::host
