// From the caller's ranges to provider submits.
#include <algorithm>
#include <cinttypes>

#include "core.h"
#include "status.h"

namespace kvlink {
namespace {

kvl_status check_submit_locked(const kve_peer &peer, uint32_t operation, uint64_t stream, kvl_error *err) noexcept {
  const kve_channel &channel = *peer.channel;
  if (channel.down != KVL_OK) return fail(err, channel.down, "%s", channel.down_message);
  if (peer.lost) return lost_error(peer, err);
  if (const kvl_status status = refuse_closed_locked(channel, err)) return status;
  if (operation != KVL_PUT && operation != KVL_GET) {
    return fail(err, KVL_INVALID, "operation %" PRIu32 " is neither put (0) nor get (1)", operation);
  }
  const char *what = operation == KVL_PUT ? "put" : "get";
  if (!channel.can(operation == KVL_PUT ? KVL_CAP_PUT : KVL_CAP_GET)) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' has no %s", channel.name(), what);
  }
  if (peer.role == KVL_ROLE_ACCEPTOR && !channel.can(KVL_CAP_ACCEPTOR_SUBMIT)) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' lets only the side that connected %s; peer '%s' connected to us",
                channel.name(), what, peer.id.c_str());
  }
  if (stream != 0 && !channel.can(KVL_CAP_STREAM)) {
    return fail(err, KVL_UNSUPPORTED, "provider '%s' takes no stream (got 0x%" PRIx64 ")", channel.name(), stream);
  }
  if (peer.must_connect && !peer.connected) {
    return fail(err, KVL_STATE, "peer '%s' is not connected yet", peer.id.c_str());
  }
  return KVL_OK;
}

// What a provider's refusal of a part means for its transfer. Called with the mutex held, tag still registered.
void refused_locked(kve_transfer &transfer, uint64_t tag, kvl_status status, ProviderError &error,
                    Deferred &later) noexcept {
  kve_channel &channel = *transfer.peer->channel;
  const Ref<kve_transfer> owner = take_tag_locked(channel, tag);
  if (!owner) return;  // a completion for it came before the refusal: the provider is confused, and it has ended
  status = error.pass(status, "submit", channel.name(), nullptr);
  if (!transfer.ended) {
    fail_locked(transfer, status, error.error.vendor_code, error.error.site, error.error.message, later);
  }
  finish_if_complete_locked(transfer);
}

}  // namespace

void pump(kve_peer &peer, bool retry, Deferred &later) noexcept {
  kve_channel &channel = *peer.channel;
  Lock lock(channel.mutex);
  if (peer.pumping || (peer.blocked && !retry)) return;
  peer.pumping = true;
  peer.blocked = false;
  const uint64_t most = channel.attr.max_ranges == 0 ? UINT64_MAX : channel.attr.max_ranges;
  while (!peer.lost && !peer.blocked && peer.queue.front() != nullptr) {
    const Ref<kve_transfer> transfer = Ref<kve_transfer>::share(peer.queue.front());
    const uint64_t begin = transfer->cursor;
    const uint64_t count = std::min(transfer->range_count - begin, most);
    uint64_t tag;
    try {
      tag = new_tag_locked(*transfer);
    } catch (const std::bad_alloc &) {
      fail_locked(*transfer, KVL_NO_RESOURCE, 0, "malloc", "out of memory for the transfer's bookkeeping", later);
      finish_if_complete_locked(*transfer);
      continue;
    }
    transfer->cursor += count;
    if (transfer->cursor == transfer->range_count) peer.queue.remove(transfer.get());
    ++peer.calls;
    // The parts of a transfer that the provider holds keep its ranges alive, so this pointer outlives the call.
    const kvl_range *ranges = transfer->ranges.data() + begin;
    lock.unlock();
    kvl_completion done{};
    ProviderError error;
    const kvl_status status =
        channel.api->submit(peer.link, transfer->operation, ranges, count, transfer->stream, tag, &done, &error.error);
    lock.lock();
    leave_locked(peer);
    if (status == KVL_DONE) {
      done.tag = tag;
      complete_locked(channel, done, later);
    } else if (status == KVL_AGAIN) {
      if (!take_tag_locked(channel, tag)) continue;  // completed although refused: already dealt with
      transfer->cursor = begin;
      if (transfer->stop != Stop::kNone || transfer->failure.status != KVL_OK || transfer->ended) {
        transfer->dropped = true;
        if (decltype(peer.queue)::contains(transfer.get())) peer.queue.remove(transfer.get());
        finish_if_complete_locked(*transfer);
        continue;
      }
      if (!decltype(peer.queue)::contains(transfer.get())) peer.queue.push_front(transfer.get());
      peer.blocked = true;
    } else if (status != KVL_OK) {
      refused_locked(*transfer, tag, status, error, later);
    } else if (transfer->stop != Stop::kNone || transfer->failure.status != KVL_OK) {
      // It was stopped while this part went in: the part's tag was perhaps not known to the provider's cancel yet.
      if (channel.can(KVL_CAP_CANCEL)) later.cancel(&peer, tag);
    }
  }
  if (peer.blocked) {
    try {
      channel.blocked.push_back(Ref<kve_peer>::share(&peer));
      arm_timer_locked(channel, after_ms(now_ns(), 1), later);
    } catch (const std::bad_alloc &) {
      peer.blocked = false;  // the next submit tries again
    }
  }
  peer.pumping = false;
}

kvl_status submit_transfer(kve_peer &peer, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                           uint32_t timeout_ms, uint32_t flags, kve_transfer **out, kvl_error *err) {
  const uint64_t start = now_ns();
  kve_channel &channel = *peer.channel;
  if (count > 0 && ranges == nullptr) return fail(err, KVL_INVALID, "ranges is NULL and count is %" PRIu64, count);
  {
    Lock lock(channel.mutex);
    if (const kvl_status status = check_submit_locked(peer, operation, stream, err)) return status;
  }
  RangePlan plan;
  if (const kvl_status status = plan_ranges(channel, peer, operation, ranges, count, plan, err)) {
    // A channel or peer closed meanwhile takes its regions along: that is the reason to give, not the stale handle.
    Lock lock(channel.mutex);
    const kvl_status closed = check_submit_locked(peer, operation, stream, err);
    return closed != KVL_OK ? closed : status;
  }

  Ref<kve_transfer> transfer;
  Deferred later;
  try {
    transfer = Ref<kve_transfer>::adopt(new kve_transfer);
  } catch (...) {
    Lock lock(channel.mutex);
    release_uses_locked(channel, plan.uses);
    throw;
  }
  transfer->peer = Ref<kve_peer>::share(&peer);
  transfer->operation = operation;
  transfer->stream = stream;
  transfer->bytes = plan.bytes;
  transfer->range_count = plan.ranges.size();
  transfer->start_ns = start;
  transfer->timeout_ms = timeout_ms == 0 ? channel.default_timeout_ms : timeout_ms;
  transfer->deadline_ns = after_ms(start, transfer->timeout_ms);
  transfer->ranges = std::move(plan.ranges);
  transfer->notify = (flags & KVE_NOTIFY) != 0;
  {
    Lock lock(channel.mutex);
    if (const kvl_status status = check_submit_locked(peer, operation, stream, err)) {
      release_uses_locked(channel, plan.uses);
      return status;
    }
    transfer->uses = std::move(plan.uses);
    transfer->id = ++channel.next_id;
    ++channel.statistics.submitted;
    ++channel.statistics.in_flight;
    channel.statistics.ranges_in += count;
    channel.statistics.ranges_out += transfer->range_count;
    peer.live.push_back(transfer.get());
    if (transfer->range_count > 0) {
      peer.queue.push_back(transfer.get());
    } else {
      finish_if_complete_locked(*transfer);
    }
  }
  pump(peer, false, later);
  if (transfer->done.load(std::memory_order_acquire) == 0) {
    Lock lock(channel.mutex);
    if (!transfer->ended) {
      channel.next_timer_ns = std::min(channel.next_timer_ns, transfer->deadline_ns);
      arm_timer_locked(channel, transfer->deadline_ns, later);
    }
  }
  run(channel, later);
  *out = transfer.release();
  return KVL_OK;
}

}  // namespace kvlink
