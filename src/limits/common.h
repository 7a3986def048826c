// What the limits share: the clock, the shape of a block, the export mark.
#ifndef KVLINK_LIMITS_COMMON_H
#define KVLINK_LIMITS_COMMON_H

#include <chrono>
#include <cstdint>

#define KVM_EXPORT extern "C" __attribute__((visibility("default")))

namespace kvlink::limits {

struct Block {
  int64_t local;
  int64_t remote;
  int64_t length;
};

inline const Block *as_blocks(const int64_t *triples) { return reinterpret_cast<const Block *>(triples); }

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

}  // namespace kvlink::limits

#endif  // KVLINK_LIMITS_COMMON_H
