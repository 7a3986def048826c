// One pass over the caller's ranges: check, coalesce, split.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "handles.h"
#include "kvlink/provider.h"

struct kve_channel;
struct kve_peer;

namespace kvlink {

// A growing array of ranges on the heap. Plain memory: nothing is initialised that is about to be overwritten.
class RangeArray {
 public:
  RangeArray() = default;
  RangeArray(RangeArray &&other) noexcept { *this = std::move(other); }
  RangeArray &operator=(RangeArray &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~RangeArray() { std::free(data_); }

  const kvl_range *data() const noexcept { return data_; }
  uint64_t size() const noexcept { return size_; }
  void reserve(uint64_t capacity);  // throws std::bad_alloc
  void push(const kvl_range &range) {
    if (size_ == capacity_) reserve(capacity_ == 0 ? 4 : capacity_ * 2);
    data_[size_++] = range;
  }
  // Gives back what coalescing made superfluous.
  void shrink() noexcept;
  void reset() noexcept { *this = RangeArray(); }

 private:
  kvl_range *data_ = nullptr;
  uint64_t size_ = 0;
  uint64_t capacity_ = 0;
};

// What a transfer will do, checked. `uses` holds each distinct region once; its `uses` counter was raised.
struct RangePlan {
  RangeArray ranges;
  uint64_t bytes = 0;
  std::vector<Ref<Region>> uses;
};

// Checks every range against its regions and builds the plan. On failure nothing is held. Throws std::bad_alloc.
kvl_status plan_ranges(kve_channel &channel, const kve_peer &peer, uint32_t operation, const kvl_range *ranges,
                       uint64_t count, RangePlan &plan, kvl_error *err);

}  // namespace kvlink
