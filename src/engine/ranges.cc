#include "ranges.h"

#include <array>
#include <cstring>
#include <new>

#include "core.h"
#include "status.h"

namespace kvlink {

void RangeArray::reserve(uint64_t capacity) {
  if (capacity <= capacity_) return;
  if (capacity > SIZE_MAX / sizeof(kvl_range)) throw std::bad_alloc();
  void *grown = std::realloc(data_, capacity * sizeof(kvl_range));
  if (grown == nullptr) throw std::bad_alloc();
  data_ = static_cast<kvl_range *>(grown);
  capacity_ = capacity;
}

void RangeArray::shrink() noexcept {
  if (size_ == 0 || size_ > capacity_ / 4) return;
  void *smaller = std::realloc(data_, size_ * sizeof(kvl_range));
  if (smaller == nullptr) return;
  data_ = static_cast<kvl_range *>(smaller);
  capacity_ = size_;
}

namespace {

// The regions that this batch has met, by handle: each is looked up under the channel's mutex once a batch.
class SeenRegions {
 public:
  Region *find(uint32_t handle) const noexcept {
    for (size_t i = start(handle);; i = (i + 1) & (capacity_ - 1)) {
      if (slots_[i].region == nullptr) return nullptr;
      if (slots_[i].handle == handle) return slots_[i].region;
    }
  }
  void add(uint32_t handle, Region *region) {
    if (2 * (count_ + 1) > capacity_) grow();
    place(handle, region);
    ++count_;
  }

 private:
  struct Slot {
    uint32_t handle = 0;
    Region *region = nullptr;
  };
  size_t start(uint32_t handle) const noexcept { return (handle * 0x9E3779B1u >> 7) & (capacity_ - 1); }
  void place(uint32_t handle, Region *region) noexcept {
    size_t i = start(handle);
    while (slots_[i].region != nullptr) i = (i + 1) & (capacity_ - 1);
    slots_[i] = {handle, region};
  }
  void grow() {
    std::vector<Slot> old(slots_, slots_ + capacity_);
    std::vector<Slot> larger(capacity_ * 4);
    heap_.swap(larger);
    slots_ = heap_.data();
    capacity_ *= 4;
    for (const Slot &slot : old) {
      if (slot.region != nullptr) place(slot.handle, slot.region);
    }
  }

  std::array<Slot, 16> inline_{};
  std::vector<Slot> heap_;
  Slot *slots_ = inline_.data();
  size_t capacity_ = inline_.size();
  size_t count_ = 0;
};

class Planner {
 public:
  Planner(kve_channel &channel, const kve_peer &peer, uint32_t operation, RangePlan &plan, kvl_error *err)
      : channel_(channel), peer_(peer), operation_(operation), plan_(plan), err_(err) {
    const uint64_t alignment = channel.attr.alignment;
    power_of_two_ = (alignment & (alignment - 1)) == 0;
  }

  kvl_status run(const kvl_range *ranges, uint64_t count) {
    plan_.ranges.reserve(count);
    kvl_range current{};
    uint32_t mem = 0, rmem = 0;  // no handle is 0
    const Region *local = nullptr, *remote = nullptr;
    const uint64_t alignment = channel_.attr.alignment;
    for (uint64_t i = 0; i < count; ++i) {
      kvl_range range;
      std::memcpy(&range, ranges + i, sizeof range);  // the caller's array may be unaligned
      if (range.mem != mem || local == nullptr) {
        local = meet(range.mem, true, i);
        if (local == nullptr) return status_;
        mem = range.mem;
      }
      if (range.rmem != rmem || remote == nullptr) {
        remote = meet(range.rmem, false, i);
        if (remote == nullptr) return status_;
        rmem = range.rmem;
      }
      if (range.length > local->length || range.local_offset > local->length - range.length) {
        return past_end(i, "local_offset", range.local_offset, range.length, *local);
      }
      if (range.length > remote->length || range.remote_offset > remote->length - range.length) {
        return past_end(i, "remote_offset", range.remote_offset, range.length, *remote);
      }
      if (alignment > 1 && !aligned(range, alignment)) return misaligned(i, range);
      if (range.length == 0) continue;
      if (__builtin_add_overflow(plan_.bytes, range.length, &plan_.bytes)) {
        return fail(err_, KVL_INVALID, "range %llu: the batch's bytes exceed 64 bits", ull(i));
      }
      if (range.mem == current.mem && range.rmem == current.rmem &&
          current.local_offset + current.length == range.local_offset &&
          current.remote_offset + current.length == range.remote_offset) {
        current.length += range.length;
      } else {
        emit(current);
        current = range;
      }
    }
    emit(current);
    plan_.ranges.shrink();
    return KVL_OK;
  }

 private:
  static unsigned long long ull(uint64_t value) noexcept { return value; }

  void emit(kvl_range range) {
    const uint64_t chunk = channel_.chunk_bytes;
    while (chunk != 0 && range.length > chunk) {
      kvl_range piece = range;
      piece.length = chunk;
      plan_.ranges.push(piece);
      range.local_offset += chunk;
      range.remote_offset += chunk;
      range.length -= chunk;
    }
    if (range.length > 0) plan_.ranges.push(range);
  }

  bool aligned(const kvl_range &range, uint64_t alignment) const noexcept {
    if (power_of_two_) return ((range.local_offset | range.remote_offset | range.length) & (alignment - 1)) == 0;
    return range.local_offset % alignment == 0 && range.remote_offset % alignment == 0 && range.length % alignment == 0;
  }

  // The region behind a handle, met for the first time or again. NULL: status_ says why.
  Region *meet(uint32_t handle, bool is_local, uint64_t index) {
    SeenRegions &seen = is_local ? seen_local_ : seen_remote_;
    if (Region *region = seen.find(handle)) return region;
    plan_.uses.reserve(plan_.uses.size() + 1);
    Region *region;
    {
      Lock lock(channel_.mutex);
      region = (is_local ? channel_.local : channel_.remote).find(handle);
      const bool usable = region != nullptr && region->ready && !region->closing;
      if (!usable || (!is_local && region->peer != &peer_)) {
        status_ = refuse_handle(region, handle, is_local, index);
        return nullptr;
      }
      ++region->uses;
      plan_.uses.push_back(Ref<Region>::share(region));
    }
    if (!is_local) {
      const bool put = operation_ == KVL_PUT;
      if ((region->access & (put ? KVL_ACCESS_WRITE : KVL_ACCESS_READ)) == 0) {
        status_ = fail(err_, KVL_DENIED,
                       "range %llu: a %s needs %s access to remote region 0x%08x, and peer '%s' published it for %s",
                       ull(index), put ? "put" : "get", put ? "write" : "read", handle, peer_.id.c_str(),
                       region->access == KVL_ACCESS_READ    ? "reading only"
                       : region->access == KVL_ACCESS_WRITE ? "writing only"
                                                            : "no access");
        return nullptr;
      }
    }
    seen.add(handle, region);
    return region;
  }

  [[gnu::cold]] kvl_status refuse_handle(const Region *region, uint32_t handle, bool is_local, uint64_t index) {
    const char *side = is_local ? "local" : "remote";
    if (region == nullptr || !region->ready) {
      return fail(err_, KVL_INVALID,
                  "range %llu: %s region handle 0x%08x is not open (closed already, or never opened)", ull(index), side,
                  handle);
    }
    if (!is_local && region->peer != &peer_) {
      return fail(err_, KVL_INVALID, "range %llu: remote region handle 0x%08x belongs to another peer than '%s'",
                  ull(index), handle, peer_.id.c_str());
    }
    return fail(err_, KVL_DENIED, "range %llu: %s region 0x%08x is being closed", ull(index), side, handle);
  }

  [[gnu::cold]] kvl_status past_end(uint64_t index, const char *what, uint64_t offset, uint64_t length,
                                    const Region &region) {
    uint64_t end;
    if (__builtin_add_overflow(offset, length, &end)) {
      return fail(err_, KVL_INVALID, "range %llu: %s %llu + length %llu overflows 64 bits (region 0x%08x: %llu bytes)",
                  ull(index), what, ull(offset), ull(length), region.handle, ull(region.length));
    }
    return fail(err_, KVL_INVALID,
                "range %llu: %s %llu + length %llu = %llu is past the end of region 0x%08x (%llu bytes)", ull(index),
                what, ull(offset), ull(length), ull(end), region.handle, ull(region.length));
  }

  [[gnu::cold]] kvl_status misaligned(uint64_t index, const kvl_range &range) {
    return fail(err_, KVL_INVALID,
                "range %llu: local_offset %llu, remote_offset %llu and length %llu must be multiples of %llu for "
                "provider '%s'",
                ull(index), ull(range.local_offset), ull(range.remote_offset), ull(range.length),
                ull(channel_.attr.alignment), channel_.name());
  }

  kve_channel &channel_;
  const kve_peer &peer_;
  const uint32_t operation_;
  RangePlan &plan_;
  kvl_error *err_;
  kvl_status status_ = KVL_OK;
  bool power_of_two_ = true;
  SeenRegions seen_local_, seen_remote_;
};

}  // namespace

kvl_status plan_ranges(kve_channel &channel, const kve_peer &peer, uint32_t operation, const kvl_range *ranges,
                       uint64_t count, RangePlan &plan, kvl_error *err) {
  kvl_status status;
  const auto undo = [&] {
    Lock lock(channel.mutex);
    release_uses_locked(channel, plan.uses);
  };
  try {
    Planner planner(channel, peer, operation, plan, err);
    status = planner.run(ranges, count);
  } catch (...) {
    undo();
    throw;
  }
  if (status != KVL_OK) undo();
  return status;
}

}  // namespace kvlink
