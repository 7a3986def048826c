// Channels: opening the provider's engine, closing it in bounded time, handing out what finished.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstring>
#include <memory>

#include "core.h"
#include "status.h"

kve_channel::~kve_channel() {
  if (event_fd >= 0) close(event_fd);
}

namespace kvlink {
namespace {

constexpr uint32_t kCloseSlackMs = 500;  // beyond the grace, before a channel is given up

struct ClaimName {
  uint64_t capability;
  const char *name;
};

kvl_status check_attributes(kve_channel &channel, kvl_error *err) noexcept {
  kvl_attr &attr = channel.attr;
  attr.exclusion_group[sizeof attr.exclusion_group - 1] = '\0';
  if (attr.alignment == 0) attr.alignment = 1;
  if (attr.memory_alignment == 0) attr.memory_alignment = 1;
  static const ClaimName claims[] = {
      {KVL_CAP_ALLOCATE, "mem_alloc"},
      {KVL_CAP_COPY, "mem_copy"},
      {KVL_CAP_CANCEL, "cancel"},
      {KVL_CAP_STATISTICS, "stats"},
      {KVL_CAP_INTERRUPT, "link_interrupt"},
      {KVL_CAP_LINK_CHECK, "link_check"},
  };
  for (const ClaimName &claim : claims) {
    if ((attr.caps & claim.capability & channel.provider->absent_caps) == 0) continue;
    return fail_at(err, KVL_INTERNAL, "engine_query", 0, "provider '%s' claims a capability but has no %s",
                   channel.name(), claim.name);
  }
  if (attr.connect_mode > KVL_CONNECT_BOTH) {
    return fail_at(err, KVL_INTERNAL, "engine_query", 0, "provider '%s' has the unknown connect mode %u",
                   channel.name(), attr.connect_mode);
  }
  channel.chunk_bytes = attr.max_range_bytes - attr.max_range_bytes % attr.alignment;
  if (attr.max_range_bytes != 0 && channel.chunk_bytes == 0) {
    return fail_at(err, KVL_INTERNAL, "engine_query", 0,
                   "provider '%s' takes ranges of at most %" PRIu64 " bytes and aligned to %" PRIu64, channel.name(),
                   attr.max_range_bytes, attr.alignment);
  }
  return KVL_OK;
}

void set_stage(kve_channel &channel, const char *stage) noexcept {
  Lock lock(channel.mutex);
  channel.closing_stage = stage;
}

void lose_all_peers(kve_channel &channel, uint32_t grace_ms) noexcept {
  Deferred later;
  {
    Lock lock(channel.mutex);
    for (const Ref<kve_peer> &peer : channel.peers) {
      lose_locked(*peer, KVL_CANCELLED, 0, "", "the channel was closed", grace_ms, later);
    }
  }
  run(channel, later);
}

void close_regions(kve_channel &channel) noexcept {
  for (;;) {
    uint32_t handle = 0;
    {
      Lock lock(channel.mutex);
      channel.local.each([&handle](const Region &region) {
        if (region.ready) handle = region.handle;
      });
      if (handle == 0) return;
      channel.local.find(handle)->ready = false;
    }
    ProviderError error;
    channel.api->mem_close(channel.engine, handle, &error.error);
  }
}

void free_allocations(kve_channel &channel) noexcept {
  for (;;) {
    uint64_t address;
    {
      Lock lock(channel.mutex);
      if (channel.allocations.empty()) return;
      address = *channel.allocations.begin();
      channel.allocations.erase(channel.allocations.begin());
    }
    channel.api->mem_free(channel.engine, address);
  }
}

// Takes the channel down, on a thread of its own: whichever provider call hangs, only this thread hangs with it.
void run_teardown(kve_channel &channel, uint32_t grace_ms) noexcept {
  lose_all_peers(channel, grace_ms);
  set_stage(channel, "an API call that is still inside the provider");
  {
    Lock lock(channel.mutex);
    channel.changed.wait(lock, [&channel] { return channel.calls == 0; });
  }
  lose_all_peers(channel, grace_ms);  // one may have been opened meanwhile
  set_stage(channel, "the provider's link_close");
  {
    Lock lock(channel.mutex);
    channel.changed.wait(lock, [&channel] { return channel.peers.empty(); });
  }
  set_stage(channel, "the provider's mem_close");
  close_regions(channel);
  free_allocations(channel);
  set_stage(channel, "the engine's thread, inside the provider's wait or poll");
  {
    Lock lock(channel.mutex);
    channel.stop_thread = true;
    channel.changed.notify_all();
  }
  wake(channel);
  {
    Lock lock(channel.mutex);
    channel.changed.wait(lock, [&channel] { return channel.thread_exited; });
  }
  channel.thread.join();
  {
    std::lock_guard<std::mutex> lock(channel.progress_mutex);
    channel.polling = false;
  }
  {
    std::lock_guard<std::mutex> lock(channel.wake_mutex);
    channel.wakeable = false;
  }
  set_stage(channel, "the provider's engine_close");
  channel.api->engine_close(channel.engine);
  release_exclusion_group(channel.attr.exclusion_group);
  Lock lock(channel.mutex);
  channel.closed = true;
  channel.changed.notify_all();
}

}  // namespace

ChannelCall::ChannelCall(kve_channel &channel, kvl_error *err) noexcept : channel_(channel) {
  Lock lock(channel.mutex);
  status_ = refuse_closed_locked(channel, err);
  if (status_ == KVL_OK) ++channel.calls;
}

ChannelCall::~ChannelCall() {
  if (status_ != KVL_OK) return;
  Lock lock(channel_.mutex);
  if (--channel_.calls == 0 && channel_.closing) channel_.changed.notify_all();
}

kvl_status refuse_closed_locked(const kve_channel &channel, kvl_error *err) noexcept {
  if (!channel.closing) return KVL_OK;
  return fail(err, KVL_STATE, "the channel is closed");
}

kvl_status open_channel(kve_provider &provider, const kve_channel_params &params, kve_channel **out, kvl_error *err) {
  if (params.struct_size < sizeof(kve_channel_params)) {
    return fail(err, KVL_INVALID, "kve_channel_params.struct_size is %u, expected at least %zu", params.struct_size,
                sizeof(kve_channel_params));
  }
  if (params.default_timeout_ms == 0) return fail(err, KVL_INVALID, "default_timeout_ms must be at least 1");
  if (params.option_count > 0 && params.options == nullptr) {
    return fail(err, KVL_INVALID, "options is NULL and option_count is %u", params.option_count);
  }
  Ref<kve_channel> channel = Ref<kve_channel>::adopt(new kve_channel);
  channel->provider = &provider;
  channel->api = &provider.table;
  channel->fork_generation = fork_generation();
  channel->default_timeout_ms = params.default_timeout_ms;
  channel->cancel_grace_ms = params.cancel_grace_ms;
  channel->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (channel->event_fd < 0) {
    return fail_at(err, KVL_NO_RESOURCE, "eventfd", errno, "no event descriptor: %s", std::strerror(errno));
  }
  kvl_engine_params engine{};
  engine.struct_size = sizeof engine;
  engine.option_count = params.option_count;
  engine.options = params.options;
  engine.device = params.device == nullptr ? "cpu" : params.device;
  ProviderError error;
  const kvl_status opened = channel->api->engine_open(&engine, &channel->engine, &error.error);
  if (opened != KVL_OK) return error.pass(opened, "engine_open", channel->name(), err);
  channel->attr.struct_size = sizeof(kvl_attr);
  kvl_status status = channel->api->engine_query(channel->engine, &channel->attr, &error.error);
  status =
      status == KVL_OK ? check_attributes(*channel, err) : error.pass(status, "engine_query", channel->name(), err);
  if (status == KVL_OK) status = claim_exclusion_group(channel->attr.exclusion_group, channel->name(), err);
  if (status != KVL_OK) {
    channel->api->engine_close(channel->engine);
    return status;
  }
  try {
    Ref<kve_channel> owned = channel;
    channel->thread = start_thread("kvlink-engine", [owned] { run_engine(*owned); });
  } catch (const std::exception &failure) {
    release_exclusion_group(channel->attr.exclusion_group);
    channel->api->engine_close(channel->engine);
    return fail_at(err, KVL_NO_RESOURCE, "pthread_create", 0, "cannot start the engine's thread: %s", failure.what());
  }
  *out = channel.release();
  return KVL_OK;
}

kvl_status close_channel(kve_channel &channel, uint32_t grace_ms, kvl_error *err) {
  bool first;
  {
    Lock lock(channel.mutex);
    first = !channel.closing;
    channel.closing = true;
  }
  if (first) {
    try {
      Ref<kve_channel> owned = Ref<kve_channel>::share(&channel);
      start_thread("kvlink-close", [owned, grace_ms] { run_teardown(*owned, grace_ms); }).detach();
    } catch (const std::exception &) {
      run_teardown(channel, grace_ms);
    }
  }
  Lock lock(channel.mutex);
  const uint64_t deadline = after_ms(now_ns(), uint64_t{grace_ms} + kCloseSlackMs);
  if (channel.changed.wait_until(lock, time_point(deadline), [&channel] { return channel.closed; })) return KVL_OK;
  for (const Ref<kve_peer> &peer : channel.peers) force_end_locked(*peer);
  return fail(err, KVL_TIMEOUT,
              "closing the channel of provider '%s' took longer than %u ms; it hangs in %s. The channel is abandoned: "
              "its thread and memory stay until the process ends",
              channel.name(), grace_ms, channel.closing_stage);
}

uint32_t drain_channel(kve_channel &channel, uint64_t *ids, uint32_t capacity) noexcept {
  uint32_t count = 0;
  for (; count < capacity; ++count) {
    // One at a time, so that a transfer whose last owner is this list is destroyed outside the lock.
    Ref<kve_transfer> transfer;
    Lock lock(channel.mutex);
    if (channel.finished.empty()) break;
    transfer = channel.finished.remove(channel.finished.front());
    ids[count] = transfer->id;
    lock.unlock();
  }
  Lock lock(channel.mutex);
  if (channel.finished.empty()) {
    uint64_t value;
    [[maybe_unused]] const ssize_t got = read(channel.event_fd, &value, sizeof value);
  }
  return count;
}

void forget_finished(kve_channel &channel) noexcept {
  {
    Lock lock(channel.mutex);
    channel.released = true;
  }
  uint64_t ids[16];
  while (drain_channel(channel, ids, 16) == 16) {
  }
}

}  // namespace kvlink
