// A transfer's way from submitted to ended: failures, stops, completions, its result, and waiting for it.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "core.h"
#include "status.h"

namespace kvlink {
namespace {

constexpr uint64_t kTagIndexBits = 24;
constexpr uint64_t kTagIndexMask = (uint64_t{1} << kTagIndexBits) - 1;
constexpr uint64_t kSpinNs = 50000;

const char *operation_name(const kve_transfer &transfer) noexcept {
  return transfer.operation == KVL_PUT ? "put" : "get";
}

void drop_rest_locked(kve_transfer &transfer) noexcept {
  if (transfer.cursor >= transfer.range_count) return;
  transfer.dropped = true;
  kve_peer &peer = *transfer.peer;
  if (decltype(peer.queue)::contains(&transfer)) peer.queue.remove(&transfer);
}

void cancel_parts_locked(kve_transfer &transfer, Deferred &later) noexcept {
  kve_peer &peer = *transfer.peer;
  if (!peer.channel->can(KVL_CAP_CANCEL) || peer.lost) return;
  for (const uint64_t tag : transfer.tags) later.cancel(&peer, tag);
}

// The status that the user sees, from what happened.
void decide_locked(kve_transfer &transfer) noexcept {
  kve_result &result = transfer.result;
  const Failure &failure = transfer.failure;
  const kve_peer &peer = *transfer.peer;
  const auto take = [&result](const Failure &from) {
    result.status = from.status;
    result.vendor_code = from.vendor_code;
    std::memcpy(result.site, from.site, sizeof result.site);
    std::memcpy(result.message, from.message, sizeof result.message);
  };
  const bool failed = failure.status != KVL_OK;
  result.path = transfer.path;
  result.ranges = transfer.range_count;
  result.bytes = std::min(transfer.bytes_done, transfer.bytes);
  if (!failed && !transfer.dropped && transfer.tags.empty()) {
    result.status = KVL_OK;
    result.bytes = transfer.bytes;
    return;
  }
  switch (transfer.stop) {
    case Stop::kTimeout:
      take(failure);
      result.status = KVL_TIMEOUT;
      format_text(result.message, sizeof result.message,
                  "the %s passed its deadline of %" PRIu32 " ms with %" PRIu64 " of %" PRIu64 " bytes done (%" PRIu64
                  " ranges, peer '%s')%s%s",
                  operation_name(transfer), transfer.timeout_ms, result.bytes, transfer.bytes, transfer.range_count,
                  peer.id.c_str(), failed ? "; it stopped with: " : "", failure.message);
      return;
    case Stop::kPeer:
      take(peer.reason);
      return;
    case Stop::kCancel:
    case Stop::kRevoke:
      if (failed && failure.status != KVL_CANCELLED) break;
      result.status = KVL_CANCELLED;
      if (transfer.stop == Stop::kRevoke) copy_text(result.site, sizeof result.site, "region_close");
      format_text(result.message, sizeof result.message,
                  "the %s was %s with %" PRIu64 " of %" PRIu64 " bytes done (peer '%s')", operation_name(transfer),
                  transfer.stop == Stop::kRevoke ? "stopped because one of its regions is being closed" : "cancelled",
                  result.bytes, transfer.bytes, peer.id.c_str());
      return;
    case Stop::kNone:
      break;
  }
  take(failure);
}

void end_locked(kve_transfer &transfer) noexcept {
  kve_channel &channel = *transfer.peer->channel;
  decide_locked(transfer);
  kve_result &result = transfer.result;
  result.struct_size = sizeof result;
  result.duration_ns = now_ns() - transfer.start_ns;
  transfer.ended = true;
  kve_statistics &statistics = channel.statistics;
  --statistics.in_flight;
  switch (result.status) {
    case KVL_OK:
      ++statistics.succeeded;
      (transfer.operation == KVL_PUT ? statistics.put_bytes : statistics.get_bytes) += result.bytes;
      break;
    case KVL_CANCELLED:
      ++statistics.cancelled;
      break;
    case KVL_TIMEOUT:
      ++statistics.timed_out;
      break;
    default:
      ++statistics.failed;
  }
  transfer.done.store(1);
  if (transfer.waiters.load() > 0) futex_wake_all(transfer.done);
  if (transfer.notify) notify_locked(transfer);
}

// Nothing of it is inside the provider any more: regions and ranges are free.
void drained_locked(kve_transfer &transfer) noexcept {
  kve_peer &peer = *transfer.peer;
  release_uses_locked(*peer.channel, transfer.uses);
  transfer.ranges.reset();
  if (!decltype(peer.live)::contains(&transfer)) return;
  const Ref<kve_transfer> dropped = peer.live.remove(&transfer);
  if (peer.lost && peer.live.empty()) peer.channel->changed.notify_all();
}

// Lends this thread to the provider for up to `left_ns`; false when the provider has no use for it.
bool busy_poll(kve_peer &peer, uint64_t left_ns) noexcept {
  kve_channel &channel = *peer.channel;
  if (!channel.can(KVL_CAP_BUSY_POLL)) return false;
  {
    Lock lock(channel.mutex);
    if (!enter_locked(peer)) return false;
  }
  channel.api->link_busy_poll(peer.link, static_cast<uint32_t>(left_ns / 1000 + 1));
  Lock lock(channel.mutex);
  leave_locked(peer);
  return true;
}

}  // namespace

void release_uses_locked(kve_channel &channel, std::vector<Ref<Region>> &uses) noexcept {
  bool notify = false;
  for (const Ref<Region> &region : uses) {
    if (--region->uses == 0 && region->closing) notify = true;
  }
  uses.clear();
  if (notify) channel.changed.notify_all();
}

void notify_locked(kve_transfer &transfer) noexcept {
  if (transfer.notified) return;
  transfer.notified = true;
  kve_channel &channel = *transfer.peer->channel;
  if (channel.released) return;
  const bool was_empty = channel.finished.empty();
  channel.finished.push_back(&transfer);
  if (!was_empty) return;  // the descriptor is readable already
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(channel.event_fd, &one, sizeof one);
}

void finish_if_complete_locked(kve_transfer &transfer) noexcept {
  if (!transfer.tags.empty() || (transfer.cursor < transfer.range_count && !transfer.dropped)) return;
  if (!transfer.ended) end_locked(transfer);
  drained_locked(transfer);
}

void fail_locked(kve_transfer &transfer, kvl_status status, int64_t vendor_code, const char *site, const char *message,
                 Deferred &later) noexcept {
  Failure &failure = transfer.failure;
  if (failure.status == KVL_OK) {
    failure.status = status;
    failure.vendor_code = vendor_code;
    copy_text(failure.site, sizeof failure.site, site);
    if (message != nullptr && message[0] != '\0') {
      copy_text(failure.message, sizeof failure.message, message);
    } else {
      format_text(failure.message, sizeof failure.message, "provider '%s' ended the %s with %s and gave no reason",
                  transfer.peer->channel->name(), operation_name(transfer), status_name(status));
    }
    drop_rest_locked(transfer);
    cancel_parts_locked(transfer, later);
  }
  if (status == KVL_LINK_DOWN || status == KVL_ENGINE_DOWN) {
    kve_peer &peer = *transfer.peer;
    lose_locked(peer, status, vendor_code, failure.site, failure.message, peer.channel->cancel_grace_ms, later);
  }
}

void stop_locked(kve_transfer &transfer, Stop stop, Deferred &later) noexcept {
  if (transfer.ended) return;
  const bool failed = transfer.failure.status != KVL_OK;
  if (!failed && (transfer.stop == Stop::kNone || stop == Stop::kTimeout)) transfer.stop = stop;
  drop_rest_locked(transfer);
  cancel_parts_locked(transfer, later);
  finish_if_complete_locked(transfer);
}

void force_end_locked(kve_peer &peer) noexcept {
  kve_channel &channel = *peer.channel;
  for (kve_transfer *transfer = peer.live.front(); transfer != nullptr;) {
    const Ref<kve_transfer> hold = Ref<kve_transfer>::share(transfer);
    transfer = decltype(peer.live)::next(transfer);
    drop_rest_locked(*hold);
    if (!hold->ended) {
      if (hold->stop == Stop::kNone && hold->failure.status == KVL_OK) hold->stop = Stop::kPeer;
      end_locked(*hold);
    }
    if (!peer.link_closed) continue;  // the provider may still touch its memory: its regions stay in use
    while (!hold->tags.empty()) take_tag_locked(channel, hold->tags.back());
    drained_locked(*hold);
  }
}

uint64_t new_tag_locked(kve_transfer &transfer) {
  kve_channel &channel = *transfer.peer->channel;
  transfer.tags.reserve(transfer.tags.size() + 1);
  if (channel.free_tags.empty()) {
    const uint64_t index = channel.tags.size();
    if (index > kTagIndexMask) throw std::bad_alloc();
    channel.free_tags.reserve(index + 1);  // so that giving a tag back never allocates
    channel.tags.emplace_back();
    channel.free_tags.push_back(static_cast<uint32_t>(index));
  }
  const uint32_t index = channel.free_tags.back();
  channel.free_tags.pop_back();
  const uint64_t tag = ++channel.tag_sequence << kTagIndexBits | index;
  channel.tags[index].tag = tag;
  channel.tags[index].transfer = Ref<kve_transfer>::share(&transfer);
  transfer.tags.push_back(tag);
  return tag;
}

Ref<kve_transfer> take_tag_locked(kve_channel &channel, uint64_t tag) noexcept {
  const uint64_t index = tag & kTagIndexMask;
  if (index >= channel.tags.size() || channel.tags[index].tag != tag || tag == 0) return {};
  kve_channel::TagSlot &slot = channel.tags[index];
  Ref<kve_transfer> transfer = std::move(slot.transfer);
  slot.tag = 0;
  channel.free_tags.push_back(static_cast<uint32_t>(index));
  std::vector<uint64_t> &tags = transfer->tags;
  const auto found = std::find(tags.begin(), tags.end(), tag);
  if (found != tags.end()) {
    *found = tags.back();
    tags.pop_back();
  }
  return transfer;
}

void complete_locked(kve_channel &channel, const kvl_completion &completion, Deferred &later) noexcept {
  const Ref<kve_transfer> transfer = take_tag_locked(channel, completion.tag);
  if (!transfer) {
    ++channel.unknown_completions;
    return;
  }
  if (!transfer->ended) {
    transfer->bytes_done +=
        std::min(completion.bytes, transfer->bytes - std::min(transfer->bytes, transfer->bytes_done));
    if (completion.status == KVL_OK || completion.status == KVL_DONE) {
      const uint32_t last = static_cast<uint32_t>(channel.provider->path_names.size()) - 1;
      transfer->path = std::max(transfer->path, std::min(completion.path, last));
    } else {
      const bool may = is_failure_status(completion.status) && completion.status != KVL_AGAIN;
      char site[sizeof completion.site], message[sizeof completion.message];
      copy_text(site, sizeof site, completion.site);
      copy_text(message, sizeof message, completion.message);
      fail_locked(*transfer, may ? completion.status : KVL_INTERNAL, completion.vendor_code, site, message, later);
    }
  }
  finish_if_complete_locked(*transfer);
}

bool wait_transfer(kve_transfer &transfer, uint32_t timeout_ms) noexcept {
  if (transfer.done.load(std::memory_order_acquire) != 0) return true;
  kve_channel &channel = *transfer.peer->channel;
  static const bool alone = sysconf(_SC_NPROCESSORS_ONLN) < 2;
  const uint64_t start = now_ns();
  const uint64_t deadline = after_ms(start, timeout_ms);
  // Progress made here saves the hop through the engine thread. As long as the provider has work that needs no event,
  // this thread does it: it would only wait for the other one otherwise.
  uint64_t spin_until = std::min(deadline, start + (alone ? 0 : kSpinNs));
  Drive last = Drive::kIdle;
  for (;;) {
    last = drive(channel, false);
    if (transfer.done.load(std::memory_order_acquire) != 0) break;
    const uint64_t now = now_ns();
    if (last == Drive::kMore && now < deadline) continue;
    if (now >= spin_until) break;
    if (last == Drive::kIdle && busy_poll(*transfer.peer, spin_until - now)) continue;
    for (int i = 0; i < 16 && transfer.done.load(std::memory_order_relaxed) == 0; ++i) cpu_pause();
  }
  if (last == Drive::kMore) wake(channel);  // the engine thread goes on with what is left
  while (transfer.done.load(std::memory_order_acquire) == 0) {
    const uint64_t now = now_ns();
    if (now >= deadline) return false;
    transfer.waiters.fetch_add(1);
    if (transfer.done.load() == 0) futex_wait(transfer.done, 0, deadline - now);
    transfer.waiters.fetch_sub(1);
  }
  return true;
}

}  // namespace kvlink
