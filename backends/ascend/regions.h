// Regions of this side and of peers, and the bytes that describe one to the other.
#ifndef KVLINK_ASCEND_REGIONS_H
#define KVLINK_ASCEND_REGIONS_H

#include <atomic>
#include <cstdint>

#include "ascend/handles.h"
#include "ascend/wire.h"

namespace kvlink::ascend {

struct Region {
  uint32_t handle = 0;
  uint32_t access = 0;  // what peers may do
  uint32_t kind = 0;    // enum kvl_memory_kind
  uint64_t address = 0;
  uint64_t length = 0;
  bool staged = false;     // not known to the vendor: moves through the host staging area
  void *vendor = nullptr;  // the vendor's memory handle; null when staged
  uint64_t sequence = 0;   // grows with every registration: a link knows what was there when it was described
  std::atomic<uint32_t> bindings{0};  // live links that the vendor bound it to
};

struct RemoteRegion {
  uint32_t handle = 0;
  uint32_t access = 0;
  uint32_t kind = 0;
  uint64_t address = 0;
  uint64_t length = 0;
  bool staged = false;
  uint32_t peer_mem = 0;  // the peer's handle
  uint64_t sequence = 0;  // the peer's
};

using RegionTable = HandleTable<Region>;
using RemoteTable = HandleTable<RemoteRegion>;

struct RegionBlob {
  static constexpr uint32_t kMagic = 0x524b5641;  // "AVKR"
  static constexpr uint32_t kVersion = 1;
  uint32_t magic;
  uint32_t version;
  uint32_t mem;
  uint32_t access;
  uint32_t kind;
  uint32_t staged;
  uint64_t address;
  uint64_t length;
  uint64_t sequence;
};
static_assert(sizeof(RegionBlob) == 48, "a wire struct has no padding");

RegionBlob make_region_blob(const Region &region);
// Checks size, version and every field; the bytes come from the peer.
Failure parse_region_blob(const void *data, uint64_t length, RegionBlob *blob);
// A piece of work in addresses, as vendors want it.
struct Descriptor {
  uint64_t local;
  uint64_t remote;
  uint64_t length;
};

// What submit finds out about its ranges in one pass, without allocating.
struct RangePlan {
  uint64_t bytes = 0;
  uint64_t pieces = 0;         // ranges that are not empty
  bool staged = false;         // some range touches a staged region: one of the next two
  bool staged_local = false;   // some local side is staged
  bool staged_remote = false;  // some remote side is staged
  bool host_memory = false;    // some local side is host memory that the vendor itself moves
  uint64_t newest_local = 0;   // highest sequence among the regions used
  uint64_t newest_remote = 0;
};

// Bounds, overflow and access of every range. The core checked them; a slip there must not become a stray write.
Failure plan_ranges(const RegionTable &regions, const RemoteTable &remotes, uint32_t operation, const kvl_range *ranges,
                    uint64_t count, RangePlan *plan);

// A place in an array of ranges from which descriptors are drawn, batch by batch.
class RangeCursor {
 public:
  RangeCursor() = default;
  RangeCursor(const kvl_range *ranges, uint64_t count) : ranges_(ranges), count_(count) {}
  bool done() const { return next_ >= count_; }

  // Calls emit(const Descriptor &) at most `most` times and moves on. Ranges that continue each other on both sides, in
  // the same regions, are one descriptor. Returns how many were emitted; fewer than `most` only at the end. A region
  // that is gone ends it: *gone is the index of its range, else UINT64_MAX.
  template <typename Emit>
  uint64_t next(RegionTable::Reader &regions, RemoteTable::Reader &remotes, uint64_t most, Emit emit, uint64_t *gone);

 private:
  const kvl_range *ranges_ = nullptr;
  uint64_t count_ = 0;
  uint64_t next_ = 0;
};

template <typename Emit>
uint64_t RangeCursor::next(RegionTable::Reader &regions, RemoteTable::Reader &remotes, uint64_t most, Emit emit,
                           uint64_t *gone) {
  *gone = UINT64_MAX;
  uint64_t emitted = 0;
  Descriptor held{0, 0, 0};
  uint32_t held_mem = 0, held_rmem = 0;
  while (next_ < count_) {
    const kvl_range &range = ranges_[next_];
    if (range.length == 0) {
      ++next_;
      continue;
    }
    const Region *local = regions.find(range.mem);
    const RemoteRegion *remote = remotes.find(range.rmem);
    if (local == nullptr || remote == nullptr) {
      *gone = next_;
      break;
    }
    const Descriptor one{local->address + range.local_offset, remote->address + range.remote_offset, range.length};
    if (held.length != 0 && range.mem == held_mem && range.rmem == held_rmem && one.local == held.local + held.length &&
        one.remote == held.remote + held.length) {
      held.length += one.length;
    } else {
      if (held.length != 0) {
        emit(held);
        held.length = 0;
        if (++emitted == most) return emitted;
      }
      held = one;
      held_mem = range.mem;
      held_rmem = range.rmem;
    }
    ++next_;
  }
  if (held.length != 0) {
    emit(held);
    ++emitted;
  }
  return emitted;
}

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_REGIONS_H
