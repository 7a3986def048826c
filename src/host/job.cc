#include "job.h"

#include <algorithm>

namespace kvlink::host {

void Job::fail(const Failure &first) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (failure.ok()) failure = first;
  failed.store(true);
}

bool Job::finished() {
  if (outstanding > 0) return false;
  const bool stop = stopped();
  if (uses_tcp && !tcp_end && !stop) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  return claims == 0 && (!uses_memory || memory_end || stop);
}

bool Job::claim(const RegionTable &regions, const RemoteTable &remotes, uint64_t slice_bytes, Slice *slice) {
  const std::lock_guard<std::mutex> lock(mutex);
  slice->count = 0;
  slice->bytes = 0;
  if (!uses_memory || memory_end || stopped()) return false;
  RegionTable::Reader local_table(regions);
  RemoteTable::Reader remote_table(remotes);
  Cursor at = memory_at;
  while (at.range < count && slice->count < Slice::kMaxPieces && slice->bytes < slice_bytes) {
    const kvl_range &range = ranges[at.range];
    const RemoteRegion *remote = remote_table.find(range.rmem);
    const Region *local = local_table.find(range.mem);
    if (remote == nullptr || local == nullptr) {  // the core promised that this cannot happen
      failure = make_failure(KVL_INTERNAL, "submit", "a region of range %llu was closed under its transfer",
                             static_cast<unsigned long long>(at.range));
      failed.store(true);
      return false;
    }
    if (remote->path != Path::kTcp && range.length > 0) {
      if (slice->count > 0 && remote->path != slice->path) break;
      slice->path = remote->path;
      const uint64_t take = std::min(range.length - at.offset, slice_bytes - slice->bytes);
      slice->local[slice->count] = {local->base + range.local_offset + at.offset, take};
      slice->remote[slice->count] = {remote->base + range.remote_offset + at.offset, take};
      ++slice->count;
      slice->bytes += take;
      at.offset += take;
      if (at.offset < range.length) continue;
    }
    ++at.range;
    at.offset = 0;
  }
  memory_at = at;
  if (at.range == count) memory_end = true;
  if (slice->count == 0) return false;
  ++claims;
  return true;
}

bool Job::release() {
  const std::lock_guard<std::mutex> lock(mutex);
  --claims;
  return claims == 0 && (memory_end || stopped());
}

bool Job::next_frame(const RegionTable &regions, const RemoteTable &remotes, TableEntry *table, iovec *local,
                     uint32_t *entries, uint32_t *frame_bytes) {
  *entries = 0;
  *frame_bytes = 0;
  RegionTable::Reader local_table(regions);
  RemoteTable::Reader remote_table(remotes);
  Cursor at = tcp_at;
  while (at.range < count && *entries < kMaxFrameRanges && *frame_bytes < kMaxFrameBytes) {
    const kvl_range &range = ranges[at.range];
    const RemoteRegion *remote = remote_table.find(range.rmem);
    const Region *region = local_table.find(range.mem);
    if (remote == nullptr || region == nullptr) {
      fail(make_failure(KVL_INTERNAL, "submit", "a region of range %llu was closed under its transfer",
                        static_cast<unsigned long long>(at.range)));
      return false;
    }
    if (remote->path == Path::kTcp && range.length > 0) {
      const uint64_t take = std::min<uint64_t>(range.length - at.offset, kMaxFrameBytes - *frame_bytes);
      table[*entries] = {range.remote_offset + at.offset, remote->mem, static_cast<uint32_t>(take)};
      local[*entries] = {region->base + range.local_offset + at.offset, take};
      ++*entries;
      *frame_bytes += static_cast<uint32_t>(take);
      at.offset += take;
      if (at.offset < range.length) continue;
    }
    ++at.range;
    at.offset = 0;
  }
  // Zero-length ranges and those of other paths behind the last byte are no reason for another frame.
  tcp_at = at;
  if (at.range == count) tcp_end = true;
  return *entries > 0;
}

uint32_t Job::frame_targets(const RegionTable &regions, const RemoteTable &remotes, Cursor start, uint32_t frame_bytes,
                            iovec *local) const {
  RegionTable::Reader local_table(regions);
  RemoteTable::Reader remote_table(remotes);
  uint32_t entries = 0;
  Cursor at = start;
  while (at.range < count && frame_bytes > 0 && entries < kMaxFrameRanges) {
    const kvl_range &range = ranges[at.range];
    const RemoteRegion *remote = remote_table.find(range.rmem);
    const Region *region = local_table.find(range.mem);
    if (remote == nullptr || region == nullptr) return 0;
    if (remote->path == Path::kTcp && range.length > 0) {
      const uint64_t take = std::min<uint64_t>(range.length - at.offset, frame_bytes);
      local[entries++] = {region->base + range.local_offset + at.offset, take};
      frame_bytes -= static_cast<uint32_t>(take);
    }
    ++at.range;
    at.offset = 0;
  }
  return frame_bytes == 0 ? entries : 0;
}

}  // namespace kvlink::host
