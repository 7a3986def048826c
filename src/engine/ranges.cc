#include "ranges.h"

#include <array>
#include <cstddef>
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
    const char *next = reinterpret_cast<const char *>(ranges);
    const uint64_t alignment = channel_.attr.alignment;
    const Region *local = nullptr, *remote = nullptr;
    uint64_t bytes = 0;
    // The range being grown, in scalars: as a struct the compiler copies it in vectors, whose fields then stall to
    // read.
    uint32_t mem = 0, rmem = 0;
    uint64_t local_start = 0, remote_start = 0, local_end = 0, remote_end = 0;
    for (uint64_t i = 0; i < count; ++i, next += sizeof(kvl_range)) {
      const auto next_local = load<uint32_t>(next + offsetof(kvl_range, mem));
      const auto next_remote = load<uint32_t>(next + offsetof(kvl_range, rmem));
      const auto local_offset = load<uint64_t>(next + offsetof(kvl_range, local_offset));
      const auto remote_offset = load<uint64_t>(next + offsetof(kvl_range, remote_offset));
      const auto length = load<uint64_t>(next + offsetof(kvl_range, length));
      if (local == nullptr || next_local != local->handle) {
        local = seen_local_.find(next_local);
        if (local == nullptr) local = meet(next_local, true, i);
        if (local == nullptr) return status_;
      }
      if (remote == nullptr || next_remote != remote->handle) {
        remote = seen_remote_.find(next_remote);
        if (remote == nullptr) remote = meet(next_remote, false, i);
        if (remote == nullptr) return status_;
      }
      if (length > local->length || local_offset > local->length - length) {
        return past_end(i, "local_offset", local_offset, length, *local);
      }
      if (length > remote->length || remote_offset > remote->length - length) {
        return past_end(i, "remote_offset", remote_offset, length, *remote);
      }
      if (alignment > 1 && !aligned(local_offset, remote_offset, length, alignment)) {
        return misaligned(i, local_offset, remote_offset, length);
      }
      if (length == 0) continue;
      if (__builtin_add_overflow(bytes, length, &bytes)) {
        return fail(err_, KVL_INVALID, "range %llu: the batch's bytes exceed 64 bits", ull(i));
      }
      const bool adjacent =
          next_local == mem && next_remote == rmem && local_offset == local_end && remote_offset == remote_end;
      if (!adjacent) {
        emit(mem, rmem, local_start, remote_start, local_end - local_start);
        mem = next_local;
        rmem = next_remote;
        local_start = local_offset;
        remote_start = remote_offset;
      }
      local_end = local_offset + length;
      remote_end = remote_offset + length;
    }
    emit(mem, rmem, local_start, remote_start, local_end - local_start);
    plan_.bytes = bytes;
    plan_.ranges.shrink();
    return KVL_OK;
  }

 private:
  static unsigned long long ull(uint64_t value) noexcept { return value; }

  // The caller's array may be unaligned.
  template <typename Field>
  static Field load(const char *from) noexcept {
    Field value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  void emit(uint32_t mem, uint32_t rmem, uint64_t local_offset, uint64_t remote_offset, uint64_t length) {
    const uint64_t chunk = channel_.chunk_bytes;
    while (chunk != 0 && length > chunk) {
      plan_.ranges.push({mem, rmem, local_offset, remote_offset, chunk});
      local_offset += chunk;
      remote_offset += chunk;
      length -= chunk;
    }
    if (length > 0) plan_.ranges.push({mem, rmem, local_offset, remote_offset, length});
  }

  bool aligned(uint64_t a, uint64_t b, uint64_t c, uint64_t alignment) const noexcept {
    if (power_of_two_) return ((a | b | c) & (alignment - 1)) == 0;
    return a % alignment == 0 && b % alignment == 0 && c % alignment == 0;
  }

  // Looks up a region that this batch names for the first time, and holds it. NULL: status_ says why.
  [[gnu::noinline]] Region *meet(uint32_t handle, bool is_local, uint64_t index) {
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
    (is_local ? seen_local_ : seen_remote_).add(handle, region);
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

  [[gnu::cold]] kvl_status misaligned(uint64_t index, uint64_t local_offset, uint64_t remote_offset, uint64_t length) {
    return fail(err_, KVL_INVALID,
                "range %llu: local_offset %llu, remote_offset %llu and length %llu must be multiples of %llu for "
                "provider '%s'",
                ull(index), ull(local_offset), ull(remote_offset), ull(length), ull(channel_.attr.alignment),
                channel_.name());
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
