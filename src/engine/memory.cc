// Local regions and imported ones: open, export, copy, and close while transfers still use them.
#include <cinttypes>

#include "core.h"
#include "status.h"

namespace kvlink {
namespace {

constexpr uint32_t kAllAccess = KVL_ACCESS_READ | KVL_ACCESS_WRITE;

kvl_status check_desc(const kve_channel &channel, const kvl_mem_desc &desc, kvl_error *err) noexcept {
  if (desc.struct_size < sizeof(kvl_mem_desc)) {
    return fail(err, KVL_INVALID, "kvl_mem_desc.struct_size is %u, expected at least %zu", desc.struct_size,
                sizeof(kvl_mem_desc));
  }
  if (desc.address == 0 || desc.length == 0) {
    return fail(err, KVL_INVALID, "a region needs memory: address 0x%" PRIx64 ", %" PRIu64 " bytes", desc.address,
                desc.length);
  }
  if (desc.length > UINT64_MAX - desc.address) {
    return fail(err, KVL_INVALID, "address 0x%" PRIx64 " + %" PRIu64 " bytes overflows 64 bits", desc.address,
                desc.length);
  }
  if (desc.access > kAllAccess) {
    return fail(err, KVL_INVALID, "access %u has unknown bits (read is 1, write is 2)", desc.access);
  }
  if (desc.kind > 63 || (channel.attr.memory_kinds >> desc.kind & 1) == 0) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' takes no memory of kind %u (0 is host, 1 is device)",
                channel.name(), desc.kind);
  }
  const uint64_t alignment = channel.attr.memory_alignment;
  if (alignment > 1 && (desc.address % alignment != 0 || desc.length % alignment != 0)) {
    return fail(err, KVL_INVALID,
                "address 0x%" PRIx64 " and length %" PRIu64 " must be multiples of %" PRIu64 " for provider '%s'",
                desc.address, desc.length, alignment, channel.name());
  }
  return KVL_OK;
}

kvl_status stale(uint32_t handle, const char *side, kvl_error *err) noexcept {
  return fail(err, KVL_INVALID, "%s region handle 0x%08x is not open (closed already, or never opened)", side, handle);
}

// Adds a region that is not usable yet. Throws std::bad_alloc.
kvl_status add_region(kve_channel &channel, HandleTable &table, uint64_t length, uint32_t access, const kve_peer *peer,
                      Ref<Region> &out, kvl_error *err) {
  Ref<Region> region = Ref<Region>::adopt(new Region);
  region->length = length;
  region->access = access;
  region->peer = peer;
  Lock lock(channel.mutex);
  if (table.insert(region) == 0) {
    return fail(err, KVL_NO_RESOURCE, "all %u region handles are in use", 1u << KVL_HANDLE_INDEX_BITS);
  }
  out = std::move(region);
  return KVL_OK;
}

// Holds a local region open during one provider call on it.
class RegionUse {
 public:
  RegionUse(kve_channel &channel, uint32_t handle, kvl_error *err) : channel_(channel) {
    held_.reserve(1);
    Lock lock(channel.mutex);
    Region *region = channel.local.find(handle);
    if (region == nullptr || !region->ready) {
      status_ = stale(handle, "local", err);
    } else if (region->closing) {
      status_ = fail(err, KVL_STATE, "local region 0x%08x is being closed", handle);
    } else {
      ++region->uses;
      held_.push_back(Ref<Region>::share(region));
    }
  }
  ~RegionUse() {
    Lock lock(channel_.mutex);
    release_uses_locked(channel_, held_);
  }
  RegionUse(const RegionUse &) = delete;
  RegionUse &operator=(const RegionUse &) = delete;
  kvl_status status() const noexcept { return status_; }
  const Region &region() const noexcept { return *held_.front(); }

 private:
  kve_channel &channel_;
  std::vector<Ref<Region>> held_;
  kvl_status status_ = KVL_OK;
};

void revoke_locked(kve_channel &channel, const Region &region, Deferred &later) noexcept {
  for (const Ref<kve_peer> &peer : channel.peers) {
    for (kve_transfer *transfer = peer->live.front(); transfer != nullptr;) {
      const Ref<kve_transfer> hold = Ref<kve_transfer>::share(transfer);
      transfer = decltype(peer->live)::next(transfer);
      for (const Ref<Region> &use : hold->uses) {
        if (use.get() != &region) continue;
        stop_locked(*hold, Stop::kRevoke, later);
        break;
      }
    }
  }
}

// Refuses new uses, stops the transfers that touch the region and waits for them. OK: it is unused, and the caller is
// the one that closes it. `finished` ends the wait early.
template <typename Finished>
kvl_status quiesce(kve_channel &channel, Region &region, uint32_t timeout_ms, Finished finished, kvl_error *err) {
  Deferred later;
  {
    Lock lock(channel.mutex);
    if (region.closer) return fail(err, KVL_BUSY, "another thread is closing region 0x%08x", region.handle);
    region.closing = region.closer = true;
    revoke_locked(channel, region, later);
  }
  run(channel, later);
  Lock lock(channel.mutex);
  const auto done = [&] { return region.uses == 0 || finished(); };
  if (channel.changed.wait_until(lock, time_point(after_ms(now_ns(), timeout_ms)), done)) return KVL_OK;
  region.closer = false;
  return fail(err, KVL_TIMEOUT,
              "region 0x%08x (%" PRIu64 " bytes) is still used by %" PRIu64
              " transfers after %u ms: close the peers "
              "concerned, then close it again",
              region.handle, region.length, region.uses, timeout_ms);
}

}  // namespace

kvl_status allocate_memory(kve_channel &channel, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  if (!channel.can(KVL_CAP_ALLOCATE)) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' allocates no memory", channel.name());
  }
  if (length == 0) return fail(err, KVL_INVALID, "cannot allocate 0 bytes");
  ProviderError error;
  uint64_t got = 0;
  const kvl_status status = channel.api->mem_alloc(channel.engine, kind, length, &got, &error.error);
  if (status != KVL_OK) return error.pass(status, "mem_alloc", channel.name(), err);
  try {
    Lock lock(channel.mutex);
    channel.allocations.insert(got);
  } catch (...) {
    channel.api->mem_free(channel.engine, got);
    throw;
  }
  *address = got;
  return KVL_OK;
}

void free_memory(kve_channel &channel, uint64_t address) {
  const ChannelCall call(channel, nullptr);
  if (!call.ok()) return;  // closing the channel frees it
  {
    Lock lock(channel.mutex);
    if (channel.allocations.erase(address) == 0) return;
  }
  channel.api->mem_free(channel.engine, address);
}

kvl_status open_memory(kve_channel &channel, const kvl_mem_desc &desc, uint32_t *mem, kvl_error *err) {
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  if (const kvl_status status = check_desc(channel, desc, err)) return status;
  Ref<Region> region;
  if (const kvl_status status = add_region(channel, channel.local, desc.length, desc.access, nullptr, region, err)) {
    return status;
  }
  ProviderError error;
  const kvl_status status = channel.api->mem_open(channel.engine, region->handle, &desc, &error.error);
  Lock lock(channel.mutex);
  if (status != KVL_OK) {
    channel.local.remove(region->handle);
    return error.pass(status, "mem_open", channel.name(), err);
  }
  region->ready = true;
  *mem = region->handle;
  return KVL_OK;
}

kvl_status export_memory(kve_channel &channel, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  const RegionUse use(channel, mem, err);
  if (use.status() != KVL_OK) return use.status();
  ProviderError error;
  const kvl_status status = channel.api->mem_export(channel.engine, mem, buffer, length, &error.error);
  return status == KVL_OK ? status : error.pass(status, "mem_export", channel.name(), err);
}

kvl_status close_memory(kve_channel &channel, uint32_t mem, uint32_t timeout_ms, kvl_error *err) {
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  Ref<Region> region;
  {
    Lock lock(channel.mutex);
    Region *found = channel.local.find(mem);
    if (found == nullptr || !found->ready) return stale(mem, "local", err);
    region = Ref<Region>::share(found);
  }
  if (const kvl_status status = quiesce(channel, *region, timeout_ms, [] { return false; }, err)) return status;
  ProviderError error;
  const kvl_status status = channel.api->mem_close(channel.engine, mem, &error.error);
  Lock lock(channel.mutex);
  region->closer = false;
  if (status != KVL_OK) return error.pass(status, "mem_close", channel.name(), err);
  region->ready = false;
  channel.local.remove(mem);
  return KVL_OK;
}

kvl_status copy_memory(kve_channel &channel, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                       int32_t to_region, kvl_error *err) {
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  if (!channel.can(KVL_CAP_COPY)) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' does not copy between host memory and regions", channel.name());
  }
  const RegionUse use(channel, mem, err);
  if (use.status() != KVL_OK) return use.status();
  if (length > use.region().length || offset > use.region().length - length) {
    return fail(err, KVL_INVALID,
                "offset %" PRIu64 " + length %" PRIu64 " is past the end of region 0x%08x (%" PRIu64 " bytes)", offset,
                length, mem, use.region().length);
  }
  if (length == 0) return KVL_OK;
  if (host == nullptr) return fail(err, KVL_INVALID, "the host buffer is NULL");
  ProviderError error;
  const kvl_status status = channel.api->mem_copy(channel.engine, mem, offset, host, length, to_region, &error.error);
  return status == KVL_OK ? status : error.pass(status, "mem_copy", channel.name(), err);
}

kvl_status open_remote(kve_peer &peer, const void *blob, uint64_t blob_length, uint64_t length, uint32_t access,
                       uint32_t timeout_ms, uint32_t *rmem, kvl_error *err) {
  kve_channel &channel = *peer.channel;
  if (length == 0) return fail(err, KVL_INVALID, "peer '%s' published a region of 0 bytes", peer.id.c_str());
  if (access > kAllAccess) {
    return fail(err, KVL_INVALID, "peer '%s' published access %u, which has unknown bits", peer.id.c_str(), access);
  }
  Ref<Region> region;
  if (const kvl_status status = add_region(channel, channel.remote, length, access, &peer, region, err)) return status;
  {
    Lock lock(channel.mutex);
    kvl_status refused = KVL_OK;
    if (peer.connecting) {
      refused = fail(err, KVL_STATE, "peer '%s' is still connecting", peer.id.c_str());
    } else if (!enter_locked(peer)) {
      refused = lost_error(peer, err);
    }
    if (refused != KVL_OK) {
      channel.remote.remove(region->handle);
      return refused;
    }
  }
  ProviderError error;
  const kvl_status status =
      channel.api->rmem_open(peer.link, region->handle, blob, blob_length, timeout_ms, &error.error);
  Lock lock(channel.mutex);
  leave_locked(peer);
  if (status != KVL_OK) {
    channel.remote.remove(region->handle);
    return error.pass(status, "rmem_open", channel.name(), err);
  }
  region->ready = true;
  *rmem = region->handle;
  // A peer lost meanwhile: its closer, which waits for this call, closes the region with the link.
  return peer.lost ? lost_error(peer, err) : KVL_OK;
}

kvl_status close_remote(kve_peer &peer, uint32_t rmem, uint32_t timeout_ms, kvl_error *err) {
  kve_channel &channel = *peer.channel;
  Ref<Region> region;
  {
    Lock lock(channel.mutex);
    if (peer.closed) return KVL_OK;
    Region *found = channel.remote.find(rmem);
    if (found == nullptr || found->peer != &peer) return stale(rmem, "remote", err);
    region = Ref<Region>::share(found);
  }
  const uint64_t deadline = after_ms(now_ns(), timeout_ms);
  const auto finished = [&peer] { return peer.lost; };
  if (const kvl_status status = quiesce(channel, *region, timeout_ms, finished, err)) return status;
  {
    Lock lock(channel.mutex);
    if (!enter_locked(peer)) {  // the closer of a lost peer does it
      region->closer = false;
      if (channel.changed.wait_until(lock, time_point(deadline), [&peer] { return peer.closed; })) return KVL_OK;
      return fail(err, KVL_TIMEOUT, "the link to peer '%s' is still being closed after %u ms", peer.id.c_str(),
                  timeout_ms);
    }
    region->ready = false;
  }
  channel.api->rmem_close(peer.link, rmem);
  Lock lock(channel.mutex);
  region->closer = false;
  channel.remote.remove(rmem);
  leave_locked(peer);
  return KVL_OK;
}

}  // namespace kvlink
