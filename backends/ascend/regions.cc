#include "ascend/regions.h"

#include <algorithm>

namespace kvlink::ascend {

RegionBlob make_region_blob(const Region &region) {
  RegionBlob blob{};
  blob.magic = RegionBlob::kMagic;
  blob.version = RegionBlob::kVersion;
  blob.mem = region.handle;
  blob.access = region.access;
  blob.kind = region.kind;
  blob.staged = region.staged ? 1 : 0;
  blob.address = region.address;
  blob.length = region.length;
  blob.sequence = region.sequence;
  return blob;
}

Failure parse_region_blob(const void *data, uint64_t length, RegionBlob *blob) {
  const Failure failure = check_frame(data, length, RegionBlob::kVersion, "Ascend", "rmem_open", blob);
  if (!failure.ok()) return failure;
  if (blob->length == 0 || blob->address == 0 || blob->address + blob->length < blob->address || blob->staged > 1 ||
      blob->kind > KVL_MEMORY_DEVICE || (blob->access & ~uint32_t{KVL_ACCESS_READ | KVL_ACCESS_WRITE}) != 0) {
    return make_failure(KVL_INVALID, "rmem_open",
                        "the peer describes a region at %#" PRIx64 " with %" PRIu64 " bytes, access %#x and kind %u",
                        blob->address, blob->length, blob->access, blob->kind);
  }
  return {};
}

Failure export_bytes(const void *blob, uint64_t size, void *buffer, uint64_t *length, const char *site) {
  const bool fits = buffer != nullptr && *length >= size;
  *length = size;
  if (!fits) return make_failure(KVL_NO_RESOURCE, site, "the description needs %" PRIu64 " bytes", size);
  std::memcpy(buffer, blob, size);
  return {};
}

Failure plan_ranges(const RegionTable &regions, const RemoteTable &remotes, uint32_t operation, const kvl_range *ranges,
                    uint64_t count, RangePlan *plan) {
  const uint32_t needed = operation == KVL_PUT ? KVL_ACCESS_WRITE : KVL_ACCESS_READ;
  RegionTable::Reader locals(regions);
  RemoteTable::Reader others(remotes);
  const Region *local = nullptr;
  const RemoteRegion *remote = nullptr;
  for (uint64_t i = 0; i < count; ++i) {
    const kvl_range &range = ranges[i];
    if (local == nullptr || local->handle != range.mem) {
      local = locals.find(range.mem);
      if (local != nullptr) {
        plan->staged_local |= local->staged;
        plan->host_memory |= local->kind == KVL_MEMORY_HOST && !local->staged;
        plan->newest_local = std::max(plan->newest_local, local->sequence);
      }
    }
    if (remote == nullptr || remote->handle != range.rmem) {
      remote = others.find(range.rmem);
      if (remote != nullptr) {
        plan->staged_remote |= remote->staged;
        plan->newest_remote = std::max(plan->newest_remote, remote->sequence);
        if ((remote->access & needed) == 0) {
          return make_failure(KVL_DENIED, "submit", "range %" PRIu64 ": the peer's region %#x gives access %u, not %u",
                              i, range.rmem, remote->access, needed);
        }
      }
    }
    if (local == nullptr || remote == nullptr || range.local_offset > local->length ||
        range.length > local->length - range.local_offset || range.remote_offset > remote->length ||
        range.length > remote->length - range.remote_offset) {
      return make_failure(KVL_INVALID, "submit",
                          "range %" PRIu64 ": regions %#x and %#x, offsets %" PRIu64 " and %" PRIu64
                          ", length %" PRIu64,
                          i, range.mem, range.rmem, range.local_offset, range.remote_offset, range.length);
    }
    plan->staged = plan->staged_local || plan->staged_remote;
    plan->bytes += range.length;
    plan->pieces += range.length != 0 ? 1 : 0;
  }
  return {};
}

}  // namespace kvlink::ascend
