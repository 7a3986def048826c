// The C API: argument checks, the fork guard, and no exception past this file.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "core.h"
#include "status.h"

namespace {

using namespace kvlink;

// Runs `body` with every exception turned into a status.
template <typename Body>
kvl_status guarded(kvl_error *err, Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return fail_at(err, KVL_NO_RESOURCE, "malloc", 0, "out of memory");
  } catch (const std::exception &failure) {
    return fail(err, KVL_INTERNAL, "unexpected failure in the engine: %s", failure.what());
  } catch (...) {
    return fail(err, KVL_INTERNAL, "unexpected failure in the engine");
  }
}

kvl_status null_argument(kvl_error *err, const char *function) {
  return fail(err, KVL_INVALID, "%s: an argument is NULL", function);
}

kvl_status forked(kvl_error *err) {
  return fail(err, KVL_STATE, "this handle belongs to the parent process: open a new channel after fork");
}

// For functions whose handle is of a channel: the NULL and fork checks, then the body.
template <typename Body>
kvl_status on(const kve_channel *channel, bool arguments, const char *function, kvl_error *err, Body body) noexcept {
  if (channel == nullptr || !arguments) return null_argument(err, function);
  if (channel->forked()) return forked(err);
  return guarded(err, body);
}

const kve_channel *channel_of(const kve_peer *peer) { return peer == nullptr ? nullptr : peer->channel.get(); }

bool usable(const kve_channel *channel) { return channel != nullptr && !channel->forked(); }
bool usable(const kve_transfer *transfer) { return transfer != nullptr && usable(transfer->peer->channel.get()); }

// Copies a sized struct as far as its reader knows it.
template <typename Struct>
void copy_sized(const Struct &from, Struct *to) noexcept {
  const uint32_t size = to->struct_size;
  std::memcpy(to, &from, std::min<size_t>(size, sizeof from));
  if (size >= sizeof size) to->struct_size = size;
}

}  // namespace

// ---- providers
kvl_status kve_provider_load(const char *path, kve_provider **provider, kvl_error *err) {
  return guarded(err, [&] { return load_provider(path, provider, err); });
}
const char *kve_provider_name(const kve_provider *provider) {
  return provider == nullptr ? "" : provider->name.c_str();
}
const char *kve_provider_version(const kve_provider *provider) {
  return provider == nullptr ? "" : provider->version.c_str();
}
uint32_t kve_provider_wire_version(const kve_provider *provider) {
  return provider == nullptr ? 0 : provider->table.wire_version;
}
uint32_t kve_provider_path_count(const kve_provider *provider) {
  return provider == nullptr ? 0 : static_cast<uint32_t>(provider->path_names.size());
}
const char *kve_provider_path_name(const kve_provider *provider, uint32_t path) {
  if (provider == nullptr || path >= provider->path_names.size()) return "";
  return provider->path_names[path].c_str();
}
kvl_status kve_provider_probe(const kve_provider *provider, kvl_error *err) {
  if (provider == nullptr) return null_argument(err, "kve_provider_probe");
  ProviderError error;
  const kvl_status status = provider->table.probe(&error.error);
  return status == KVL_OK ? status : error.pass(status, "probe", provider->name.c_str(), err);
}

// ---- channels
kvl_status kve_channel_open(kve_provider *provider, const kve_channel_params *params, kve_channel **channel,
                            kvl_error *err) {
  if (provider == nullptr || params == nullptr || channel == nullptr) return null_argument(err, "kve_channel_open");
  return guarded(err, [&] { return open_channel(*provider, *params, channel, err); });
}
kvl_status kve_channel_query(kve_channel *channel, kvl_attr *attr, kvl_error *err) {
  return on(channel, attr != nullptr, "kve_channel_query", err, [&] {
    copy_sized(channel->attr, attr);
    return KVL_OK;
  });
}
int kve_channel_event_fd(kve_channel *channel) { return usable(channel) ? channel->event_fd : -1; }
uint32_t kve_channel_drain(kve_channel *channel, uint64_t *ids, uint32_t capacity) {
  return usable(channel) && ids != nullptr ? drain_channel(*channel, ids, capacity) : 0;
}
kvl_status kve_channel_close(kve_channel *channel, uint32_t grace_ms, kvl_error *err) {
  return on(channel, true, "kve_channel_close", err, [&] { return close_channel(*channel, grace_ms, err); });
}
void kve_channel_release(kve_channel *channel) {
  if (!usable(channel)) return;
  bool closing;
  {
    Lock lock(channel->mutex);
    closing = channel->closing;
  }
  if (!closing) guarded(nullptr, [&] { return close_channel(*channel, channel->cancel_grace_ms, nullptr); });
  forget_finished(*channel);
  channel->unref();
}
kvl_status kve_channel_statistics(kve_channel *channel, kve_statistics *out) {
  return on(channel, out != nullptr, "kve_channel_statistics", nullptr, [&] {
    Lock lock(channel->mutex);
    kve_statistics now = channel->statistics;
    now.struct_size = sizeof now;
    now.peers = static_cast<uint32_t>(
        std::count_if(channel->peers.begin(), channel->peers.end(), [](const auto &peer) { return !peer->lost; }));
    copy_sized(now, out);
    return KVL_OK;
  });
}
kvl_status kve_channel_provider_stats(kve_channel *channel, kvl_stat *out, uint32_t *count, kvl_error *err) {
  return on(channel, out != nullptr && count != nullptr, "kve_channel_provider_stats", err, [&]() -> kvl_status {
    const ChannelCall call(*channel, err);
    if (!call.ok()) return call.status();
    if (!channel->can(KVL_CAP_STATISTICS)) {
      return fail(err, KVL_UNSUPPORTED, "provider '%s' keeps no statistics", channel->name());
    }
    ProviderError error;
    const kvl_status status = channel->api->stats(channel->engine, out, count, &error.error);
    return status == KVL_OK ? status : error.pass(status, "stats", channel->name(), err);
  });
}

// ---- memory
kvl_status kve_mem_alloc(kve_channel *channel, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  return on(channel, address != nullptr, "kve_mem_alloc", err,
            [&] { return allocate_memory(*channel, kind, length, address, err); });
}
void kve_mem_free(kve_channel *channel, uint64_t address) {
  if (!usable(channel)) return;
  guarded(nullptr, [&] {
    free_memory(*channel, address);
    return KVL_OK;
  });
}
kvl_status kve_mem_open(kve_channel *channel, const kvl_mem_desc *desc, uint32_t *mem, kvl_error *err) {
  return on(channel, desc != nullptr && mem != nullptr, "kve_mem_open", err,
            [&] { return open_memory(*channel, *desc, mem, err); });
}
kvl_status kve_mem_export(kve_channel *channel, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  return on(channel, length != nullptr, "kve_mem_export", err,
            [&] { return export_memory(*channel, mem, buffer, length, err); });
}
kvl_status kve_mem_close(kve_channel *channel, uint32_t mem, uint32_t timeout_ms, kvl_error *err) {
  return on(channel, true, "kve_mem_close", err, [&] { return close_memory(*channel, mem, timeout_ms, err); });
}
kvl_status kve_mem_copy(kve_channel *channel, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                        int32_t to_region, kvl_error *err) {
  return on(channel, true, "kve_mem_copy", err,
            [&] { return copy_memory(*channel, mem, offset, host, length, to_region, err); });
}

// ---- peers
kvl_status kve_peer_open(kve_channel *channel, const kvl_link_params *params, kve_peer **peer, kvl_error *err) {
  return on(channel, params != nullptr && peer != nullptr, "kve_peer_open", err,
            [&] { return open_peer(*channel, *params, peer, err); });
}
kvl_status kve_peer_describe(kve_peer *peer, void *buffer, uint64_t *length, kvl_error *err) {
  return on(channel_of(peer), length != nullptr, "kve_peer_describe", err,
            [&] { return describe_peer(*peer, buffer, length, err); });
}
kvl_status kve_peer_connect(kve_peer *peer, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  return on(channel_of(peer), blob != nullptr || length == 0, "kve_peer_connect", err,
            [&] { return connect_peer(*peer, blob, length, timeout_ms, err); });
}
void kve_peer_interrupt(kve_peer *peer) {
  if (!usable(channel_of(peer))) return;
  guarded(nullptr, [&] {
    interrupt_peer(*peer);
    return KVL_OK;
  });
}
kvl_status kve_peer_check(kve_peer *peer, kvl_error *err) {
  return on(channel_of(peer), true, "kve_peer_check", err, [&] { return check_peer(*peer, err); });
}
void kve_peer_close(kve_peer *peer, kvl_status status, const char *message, uint32_t grace_ms) {
  if (!usable(channel_of(peer))) return;
  guarded(nullptr, [&] {
    close_peer(*peer, status, message, grace_ms);
    return KVL_OK;
  });
}
void kve_peer_release(kve_peer *peer) {
  if (!usable(channel_of(peer))) return;
  guarded(nullptr, [&] {
    release_peer(*peer);
    return KVL_OK;
  });
  peer->unref();
}
kvl_status kve_rmem_open(kve_peer *peer, const void *blob, uint64_t blob_length, uint64_t length, uint32_t access,
                         uint32_t timeout_ms, uint32_t *rmem, kvl_error *err) {
  return on(channel_of(peer), rmem != nullptr && (blob != nullptr || blob_length == 0), "kve_rmem_open", err,
            [&] { return open_remote(*peer, blob, blob_length, length, access, timeout_ms, rmem, err); });
}
kvl_status kve_rmem_close(kve_peer *peer, uint32_t rmem, uint32_t timeout_ms, kvl_error *err) {
  return on(channel_of(peer), true, "kve_rmem_close", err, [&] { return close_remote(*peer, rmem, timeout_ms, err); });
}

// ---- transfers
kvl_status kve_submit(kve_peer *peer, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                      uint32_t timeout_ms, uint32_t flags, kve_transfer **transfer, kvl_error *err) {
  return on(channel_of(peer), transfer != nullptr, "kve_submit", err,
            [&] { return submit_transfer(*peer, operation, ranges, count, stream, timeout_ms, flags, transfer, err); });
}
uint64_t kve_transfer_id(const kve_transfer *transfer) { return transfer == nullptr ? 0 : transfer->id; }
int32_t kve_transfer_done(const kve_transfer *transfer) {
  return usable(transfer) && transfer->done.load(std::memory_order_acquire) != 0 ? 1 : 0;
}
int32_t kve_transfer_wait(kve_transfer *transfer, uint32_t timeout_ms) {
  return usable(transfer) && wait_transfer(*transfer, timeout_ms) ? 1 : 0;
}
void kve_transfer_notify(kve_transfer *transfer) {
  if (!usable(transfer)) return;
  Lock lock(transfer->peer->channel->mutex);
  transfer->notify = true;
  if (transfer->ended) notify_locked(*transfer);
}
void kve_transfer_cancel(kve_transfer *transfer) {
  if (!usable(transfer)) return;
  kve_channel &channel = *transfer->peer->channel;
  Deferred later;
  {
    Lock lock(channel.mutex);
    stop_locked(*transfer, Stop::kCancel, later);
  }
  run(channel, later);
}
kvl_status kve_transfer_result(const kve_transfer *transfer, kve_result *out) {
  if (transfer == nullptr || out == nullptr) return KVL_INVALID;
  if (!usable(transfer)) return KVL_STATE;
  if (transfer->done.load(std::memory_order_acquire) == 0) {
    kve_result unfinished{};
    unfinished.status = KVL_AGAIN;
    copy_sized(unfinished, out);
    return KVL_OK;
  }
  copy_sized(transfer->result, out);
  return KVL_OK;
}
void kve_transfer_release(kve_transfer *transfer) {
  if (usable(transfer)) transfer->unref();
}
