// Regions and the table of the handles that name them.
#pragma once

#include <cstdint>
#include <deque>
#include <new>
#include <vector>

#include "kvlink/provider.h"
#include "ref.h"

struct kve_peer;

namespace kvlink {

// One registered local region, or one imported region of a peer. The counters are guarded by the channel's mutex.
struct Region final : RefCounted {
  uint32_t handle = 0;
  uint32_t access = 0;
  uint64_t length = 0;
  const kve_peer *peer = nullptr;  // whose region it is; NULL for a local one. Identity only, never followed.
  uint64_t uses = 0;               // transfers and calls that touch it
  bool ready = false;              // the provider has opened it
  bool closing = false;            // refuse new uses
  bool closer = false;             // one thread is closing it
};

// Handles are a dense index (low bits) and a generation (the rest), so that a stale one is recognised. A slot rests in
// a queue before it is used again: with 64 resting slots a handle comes back after 64 * 4095 others at the earliest.
class HandleTable {
 public:
  // Returns 0 when all 2^20 indices are taken; throws std::bad_alloc.
  uint32_t insert(Ref<Region> region) {
    uint32_t index;
    if (resting_.size() >= kRest || slots_.size() == kIndices) {
      if (resting_.empty()) return 0;
      index = resting_.front();
      resting_.pop_front();
    } else {
      index = static_cast<uint32_t>(slots_.size());
      slots_.emplace_back();
    }
    Slot &slot = slots_[index];
    slot.generation = slot.generation % kGenerations + 1;
    region->handle = slot.generation << KVL_HANDLE_INDEX_BITS | index;
    slot.region = std::move(region);
    return slot.region->handle;
  }

  Region *find(uint32_t handle) const noexcept {
    const uint32_t index = handle & (kIndices - 1);
    if (index >= slots_.size()) return nullptr;
    Region *region = slots_[index].region.get();
    return region != nullptr && region->handle == handle ? region : nullptr;
  }

  void remove(uint32_t handle) {
    if (find(handle) == nullptr) return;
    const uint32_t index = handle & (kIndices - 1);
    resting_.push_back(index);
    slots_[index].region = Ref<Region>();
  }

  template <typename Visit>
  void each(Visit visit) const {
    for (const Slot &slot : slots_) {
      if (slot.region) visit(*slot.region);
    }
  }

 private:
  static constexpr uint32_t kIndices = 1u << KVL_HANDLE_INDEX_BITS;
  static constexpr uint32_t kGenerations = (1u << (32 - KVL_HANDLE_INDEX_BITS)) - 1;
  static constexpr size_t kRest = 64;
  struct Slot {
    Ref<Region> region;
    uint32_t generation = 0;
  };
  std::vector<Slot> slots_;
  std::deque<uint32_t> resting_;
};

}  // namespace kvlink
