// Peers: opening and connecting a link, losing it, closing it without being held up by it.
#include <algorithm>
#include <cinttypes>
#include <system_error>

#include "core.h"
#include "status.h"

namespace kvlink {
namespace {

// What a provider may need beyond the grace it was given before its transfers are ended without it.
constexpr uint32_t kSlackMs = 300;
// How long a cancel may take before the link is closed under it.
constexpr uint32_t kDrainMs = 100;
// Between looks for the completions of a closed link.
constexpr uint32_t kPollMs = 20;

// A call on a peer's link by an API function; refuses when the peer is lost.
class PeerCall {
 public:
  PeerCall(kve_peer &peer, kvl_error *err) noexcept : peer_(peer) {
    Lock lock(peer.channel->mutex);
    if (!enter_locked(peer)) status_ = lost_error(peer, err);
  }
  ~PeerCall() {
    if (status_ != KVL_OK) return;
    Lock lock(peer_.channel->mutex);
    leave_locked(peer_);
  }
  PeerCall(const PeerCall &) = delete;
  PeerCall &operator=(const PeerCall &) = delete;
  kvl_status status() const noexcept { return status_; }

 private:
  kve_peer &peer_;
  kvl_status status_ = KVL_OK;
};

// Imported regions that nothing uses are closed before the link; one that a submit still uses ends with the link.
void close_idle_remotes(kve_peer &peer) noexcept {
  kve_channel &channel = *peer.channel;
  for (;;) {
    uint32_t handle = 0;
    {
      Lock lock(channel.mutex);
      channel.remote.each([&](const Region &region) {
        if (region.peer == &peer && region.ready && region.uses == 0) handle = region.handle;
      });
      if (handle == 0) return;
      channel.remote.find(handle)->ready = false;
    }
    channel.api->rmem_close(peer.link, handle);
  }
}

void forget_remotes_locked(kve_peer &peer) {
  kve_channel &channel = *peer.channel;
  std::vector<uint32_t> handles;
  channel.remote.each([&](const Region &region) {
    if (region.peer == &peer) handles.push_back(region.handle);
  });
  for (const uint32_t handle : handles) channel.remote.remove(handle);
}

// Runs on a thread of its own for every lost peer: a provider that hangs in link_close holds up nobody else.
void run_closer(kve_peer &peer) noexcept {
  kve_channel &channel = *peer.channel;
  bool interrupt;
  uint32_t grace_ms;
  std::vector<uint64_t> tags;
  {
    Lock lock(channel.mutex);
    interrupt = peer.connecting && channel.can(KVL_CAP_INTERRUPT);
    for (kve_transfer *t = peer.live.front(); t != nullptr; t = decltype(peer.live)::next(t)) {
      try {
        tags.insert(tags.end(), t->tags.begin(), t->tags.end());
      } catch (const std::bad_alloc &) {
        break;  // link_close stops them all anyway
      }
    }
  }
  if (interrupt) channel.api->link_interrupt(peer.link);
  if (channel.can(KVL_CAP_CANCEL)) {
    for (const uint64_t tag : tags) channel.api->cancel(peer.link, tag);
  }
  {
    Lock lock(channel.mutex);
    channel.changed.wait(lock, [&] { return peer.calls == 0; });
    grace_ms = peer.grace_ms;
    // Cancelled submits usually come back at once; then every imported region can be closed before the link.
    const uint32_t drain_ms = channel.can(KVL_CAP_CANCEL) ? std::min(grace_ms / 2, kDrainMs) : 0;
    const uint64_t start = now_ns();
    channel.changed.wait_until(lock, time_point(after_ms(start, drain_ms)), [&peer] { return peer.live.empty(); });
    grace_ms -= std::min(grace_ms, static_cast<uint32_t>((now_ns() - start) / kMillisecond));
  }
  close_idle_remotes(peer);
  channel.api->link_close(peer.link, grace_ms);
  {
    Lock lock(channel.mutex);
    peer.link_closed = true;
    try {
      forget_remotes_locked(peer);
    } catch (const std::bad_alloc &) {
      // Their handles stay taken; they can no longer be used.
    }
  }
  // Its last completions wait in poll. This thread fetches them too, in case the engine thread hangs in wait.
  wake(channel);
  const uint64_t give_up = after_ms(now_ns(), grace_ms + kSlackMs);
  for (;;) {
    drive(channel, false);
    Lock lock(channel.mutex);
    if (peer.live.empty() || now_ns() >= give_up) break;
    channel.changed.wait_until(lock, time_point(std::min(give_up, after_ms(now_ns(), kPollMs))),
                               [&peer] { return peer.live.empty(); });
  }
  Lock lock(channel.mutex);
  force_end_locked(peer);  // of a provider that broke its promise; nothing touches the memory any more
  peer.closed = true;
  auto &peers = channel.peers;
  const auto found = std::find_if(peers.begin(), peers.end(), [&peer](const auto &p) { return p.get() == &peer; });
  if (found != peers.end()) peers.erase(found);
  channel.changed.notify_all();
}

}  // namespace

bool enter_locked(kve_peer &peer) noexcept {
  if (peer.lost) return false;
  ++peer.calls;
  return true;
}

void leave_locked(kve_peer &peer) noexcept {
  if (--peer.calls == 0 && peer.lost) peer.channel->changed.notify_all();
}

kvl_status lost_error(const kve_peer &peer, kvl_error *err) noexcept {
  const Failure &reason = peer.reason;
  return fail_at(err, reason.status, reason.site, reason.vendor_code, "%s", reason.message);
}

void lose_locked(kve_peer &peer, kvl_status status, int64_t vendor_code, const char *site, const char *message,
                 uint32_t grace_ms, Deferred &later) noexcept {
  if (peer.lost) return;
  kve_channel &channel = *peer.channel;
  peer.lost = true;
  peer.reason.status = is_failure_status(status) ? status : KVL_CANCELLED;
  peer.reason.vendor_code = vendor_code;
  copy_text(peer.reason.site, sizeof peer.reason.site, site);
  if (message != nullptr && message[0] != '\0') {
    copy_text(peer.reason.message, sizeof peer.reason.message, message);
  } else {
    format_text(peer.reason.message, sizeof peer.reason.message, "the link to peer '%s' was closed", peer.id.c_str());
  }
  peer.grace_ms = grace_ms;
  peer.force_at_ns = after_ms(now_ns(), uint64_t{grace_ms} + kSlackMs);
  channel.next_timer_ns = std::min(channel.next_timer_ns, peer.force_at_ns);
  arm_timer_locked(channel, peer.force_at_ns, later);
  later.closers = true;
  for (kve_transfer *transfer = peer.live.front(); transfer != nullptr;) {
    const Ref<kve_transfer> hold = Ref<kve_transfer>::share(transfer);
    transfer = decltype(peer.live)::next(transfer);
    stop_locked(*hold, hold->stop == Stop::kTimeout ? Stop::kTimeout : Stop::kPeer, later);
  }
}

void start_closers(kve_channel &channel) noexcept {
  for (;;) {
    Ref<kve_peer> peer;
    {
      Lock lock(channel.mutex);
      for (const Ref<kve_peer> &candidate : channel.peers) {
        if (candidate->lost && !candidate->closer_started) peer = candidate;
      }
      if (!peer) return;
      peer->closer_started = true;
    }
    try {
      Ref<kve_peer> owned = peer;
      start_thread("kvlink-close", [owned] { run_closer(*owned); }).detach();
    } catch (const std::exception &) {
      run_closer(*peer);  // no thread to be had: better late than never
    }
  }
}

kvl_status open_peer(kve_channel &channel, const kvl_link_params &params, kve_peer **out, kvl_error *err) {
  if (params.struct_size < sizeof(kvl_link_params)) {
    return fail(err, KVL_INVALID, "kvl_link_params.struct_size is %u, expected at least %zu", params.struct_size,
                sizeof(kvl_link_params));
  }
  const ChannelCall call(channel, err);
  if (!call.ok()) return call.status();
  Ref<kve_peer> peer = Ref<kve_peer>::adopt(new kve_peer);
  peer->channel = Ref<kve_channel>::share(&channel);
  char id[sizeof params.peer_id];
  copy_text(id, sizeof id, params.peer_id);
  peer->id = id;
  peer->role = params.role;
  peer->must_connect = channel.attr.connect_mode == KVL_CONNECT_BOTH || params.role == KVL_ROLE_INITIATOR;
  {
    Lock lock(channel.mutex);
    if (channel.down != KVL_OK) return fail(err, channel.down, "%s", channel.down_message);
    const uint64_t most = channel.attr.max_links;
    if (most != 0 && channel.peers.size() >= most) {
      return fail(err, KVL_BUSY, "provider '%s' takes %" PRIu64 " links, and as many are open", channel.name(), most);
    }
    channel.peers.reserve(channel.peers.size() + 1);
  }
  ProviderError error;
  const kvl_status status = channel.api->link_open(channel.engine, &params, &peer->link, &error.error);
  if (status != KVL_OK) return error.pass(status, "link_open", channel.name(), err);
  Lock lock(channel.mutex);
  channel.peers.push_back(peer);
  *out = peer.release();
  return KVL_OK;
}

kvl_status describe_peer(kve_peer &peer, void *buffer, uint64_t *length, kvl_error *err) {
  const PeerCall call(peer, err);
  if (call.status() != KVL_OK) return call.status();
  ProviderError error;
  const kvl_status status = peer.channel->api->link_describe(peer.link, buffer, length, &error.error);
  return status == KVL_OK ? status : error.pass(status, "link_describe", peer.channel->name(), err);
}

kvl_status connect_peer(kve_peer &peer, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  kve_channel &channel = *peer.channel;
  {
    Lock lock(channel.mutex);
    if (peer.lost) return lost_error(peer, err);
    if (!peer.must_connect) {
      return fail(err, KVL_STATE, "the accepting side does not connect with provider '%s'", channel.name());
    }
    if (peer.connecting || peer.connected) {
      return fail(err, KVL_STATE, "peer '%s' is %s already", peer.id.c_str(),
                  peer.connecting ? "connecting" : "connected");
    }
    if (channel.attr.max_connects != 0 && channel.connects >= channel.attr.max_connects) {
      return fail(err, KVL_BUSY, "provider '%s' connects %u peers at once, and as many are under way", channel.name(),
                  channel.attr.max_connects);
    }
    peer.connecting = true;
    ++channel.connects;
    ++peer.calls;
  }
  ProviderError error;
  kvl_status status = channel.api->link_connect(peer.link, blob, length, timeout_ms, &error.error);
  Deferred later;
  {
    Lock lock(channel.mutex);
    peer.connecting = false;
    --channel.connects;
    if (status == KVL_OK) {
      peer.connected = true;
      if (peer.lost) status = lost_error(peer, err);
    } else {
      status = error.pass(status, "link_connect", channel.name(), err);
      lose_locked(peer, status, error.error.vendor_code, error.error.site, error.error.message, channel.cancel_grace_ms,
                  later);
    }
    leave_locked(peer);
  }
  run(channel, later);
  return status;
}

void interrupt_peer(kve_peer &peer) {
  kve_channel &channel = *peer.channel;
  {
    Lock lock(channel.mutex);
    if (!peer.connecting || !channel.can(KVL_CAP_INTERRUPT) || !enter_locked(peer)) return;
  }
  channel.api->link_interrupt(peer.link);
  Lock lock(channel.mutex);
  leave_locked(peer);
}

kvl_status check_peer(kve_peer &peer, kvl_error *err) {
  kve_channel &channel = *peer.channel;
  const PeerCall call(peer, err);
  if (call.status() != KVL_OK || !channel.can(KVL_CAP_LINK_CHECK)) return call.status();
  ProviderError error;
  kvl_status status = channel.api->link_check(peer.link, &error.error);
  if (status == KVL_OK) return status;
  status = error.pass(status, "link_check", channel.name(), err);
  Deferred later;
  {
    Lock lock(channel.mutex);
    lose_locked(peer, status, error.error.vendor_code, error.error.site, error.error.message, channel.cancel_grace_ms,
                later);
  }
  run(channel, later);
  return status;
}

void close_peer(kve_peer &peer, kvl_status status, const char *message, uint32_t grace_ms) {
  kve_channel &channel = *peer.channel;
  Deferred later;
  {
    Lock lock(channel.mutex);
    lose_locked(peer, status, 0, "", message, grace_ms, later);
  }
  run(channel, later);
  Lock lock(channel.mutex);
  const uint64_t deadline = after_ms(now_ns(), uint64_t{grace_ms} + kSlackMs);
  if (channel.changed.wait_until(lock, time_point(deadline), [&peer] { return peer.closed; })) return;
  force_end_locked(peer);
}

void release_peer(kve_peer &peer) {
  kve_channel &channel = *peer.channel;
  Deferred later;
  {
    Lock lock(channel.mutex);
    lose_locked(peer, KVL_CANCELLED, 0, "", "the peer's handle was released", channel.cancel_grace_ms, later);
  }
  run(channel, later);
}

}  // namespace kvlink
