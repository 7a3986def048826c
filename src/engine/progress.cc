// The engine thread: polling, deadlines, retries, and the sleep between them.
#include <algorithm>
#include <cinttypes>

#include "core.h"
#include "status.h"

namespace kvlink {
namespace {

constexpr uint32_t kBatch = 32;                       // completions taken in one poll
constexpr uint32_t kLongestWaitMs = 3600000;          // a wait without any deadline
constexpr uint64_t kRetryNs = kMillisecond;           // between attempts after AGAIN when no event comes
constexpr uint64_t kDownPauseNs = 10 * kMillisecond;  // between polls of an engine that is down

void engine_down_locked(kve_channel &channel, kvl_status status, ProviderError &error, Deferred &later) noexcept {
  if (channel.down != KVL_OK) return;
  error.pass(status == KVL_ENGINE_DOWN ? status : KVL_INTERNAL, "poll", channel.name(), nullptr);
  channel.down = KVL_ENGINE_DOWN;
  copy_text(channel.down_message, sizeof channel.down_message, error.error.message);
  for (const Ref<kve_peer> &peer : channel.peers) {
    lose_locked(*peer, KVL_ENGINE_DOWN, error.error.vendor_code, error.error.site, error.error.message,
                channel.cancel_grace_ms, later);
  }
}

// Tries again what the provider had no room for.
void retry_blocked(kve_channel &channel, Deferred &later) noexcept {
  std::vector<Ref<kve_peer>> peers;
  {
    Lock lock(channel.mutex);
    peers.swap(channel.blocked);
  }
  for (const Ref<kve_peer> &peer : peers) pump(*peer, true, later);
}

// Looks at every live deadline. Rare: only when the earliest one known has passed.
void run_timers_locked(kve_channel &channel, uint64_t now, Deferred &later) noexcept {
  uint64_t next = kForever;
  for (const Ref<kve_peer> &peer : channel.peers) {
    if (peer->lost) {
      if (now >= peer->force_at_ns) {
        force_end_locked(*peer);
        peer->force_at_ns = kForever;
      }
      next = std::min(next, peer->force_at_ns);
    }
    for (kve_transfer *transfer = peer->live.front(); transfer != nullptr;) {
      const Ref<kve_transfer> hold = Ref<kve_transfer>::share(transfer);
      transfer = decltype(peer->live)::next(transfer);
      if (hold->ended) continue;
      if (now >= hold->deadline_ns) {
        if (hold->stop != Stop::kTimeout && hold->failure.status == KVL_OK && !peer->lost) {
          hold->deadline_ns = after_ms(now, channel.cancel_grace_ms);
          stop_locked(*hold, Stop::kTimeout, later);
        } else {
          hold->deadline_ns = kForever;
          if (!peer->lost) {
            Failure reason;
            format_text(reason.message, sizeof reason.message,
                        "transfer %" PRIu64 " to peer '%s' did not stop within %" PRIu32
                        " ms after its deadline of %" PRIu32 " ms, so the link was closed",
                        hold->id, peer->id.c_str(), channel.cancel_grace_ms, hold->timeout_ms);
            lose_locked(*peer, KVL_LINK_DOWN, 0, "", reason.message, channel.cancel_grace_ms, later);
            next = std::min(next, peer->force_at_ns);
          }
        }
      }
      if (!hold->ended) next = std::min(next, hold->deadline_ns);
    }
  }
  channel.next_timer_ns = next;
}

// Sleeps in the provider until it has work. An engine that is down is only looked at now and then: its wait may return
// at once for ever.
void sleep(kve_channel &channel, uint64_t until_ns) noexcept {
  {
    Lock lock(channel.mutex);
    if (channel.down != KVL_OK) {
      channel.changed.wait_until(lock, time_point(now_ns() + kDownPauseNs), [&channel] { return channel.stop_thread; });
      return;
    }
  }
  const uint64_t now = now_ns();
  if (until_ns <= now) return;
  const uint64_t left_ms = (until_ns - now + kMillisecond - 1) / kMillisecond;
  channel.api->wait(channel.engine, static_cast<uint32_t>(std::min<uint64_t>(left_ms, kLongestWaitMs)));
}

}  // namespace

Drive drive(kve_channel &channel, bool wait_for_lock) noexcept {
  kvl_completion completions[kBatch];
  uint32_t count = kBatch;
  uint32_t more = 0;
  ProviderError error;
  kvl_status status;
  {
    std::unique_lock<std::mutex> lock(channel.progress_mutex, std::defer_lock);
    if (wait_for_lock) {
      lock.lock();
    } else if (!lock.try_lock()) {
      return Drive::kBusy;
    }
    if (!channel.polling) return Drive::kIdle;
    status = channel.api->poll(channel.engine, completions, &count, &more, &error.error);
  }
  if (status != KVL_OK) count = more = 0;
  count = std::min(count, kBatch);
  Deferred later;
  bool retry = false;
  {
    Lock lock(channel.mutex);
    for (uint32_t i = 0; i < count; ++i) complete_locked(channel, completions[i], later);
    if (status != KVL_OK) engine_down_locked(channel, status, error, later);
    retry = !channel.blocked.empty();
  }
  if (retry) retry_blocked(channel, later);
  run(channel, later);
  return more != 0 || count == kBatch ? Drive::kMore : Drive::kIdle;
}

void arm_timer_locked(kve_channel &channel, uint64_t at_ns, Deferred &later) noexcept {
  if (at_ns >= channel.sleep_until_ns) return;
  channel.sleep_until_ns = at_ns;
  later.wake = true;
}

void wake(kve_channel &channel) noexcept {
  std::lock_guard<std::mutex> lock(channel.wake_mutex);
  if (channel.wakeable) channel.api->wake(channel.engine);
}

void run(kve_channel &channel, Deferred &later) noexcept {
  for (const auto &[peer, tag] : later.cancels) {
    {
      Lock lock(channel.mutex);
      if (!enter_locked(*peer)) continue;
    }
    channel.api->cancel(peer->link, tag);
    Lock lock(channel.mutex);
    leave_locked(*peer);
  }
  later.cancels.clear();
  if (later.closers) start_closers(channel);
  if (later.wake) wake(channel);
  later.closers = later.wake = false;
}

void run_engine(kve_channel &channel) noexcept {
  for (;;) {
    const Drive drove = drive(channel, true);
    Deferred later;
    uint64_t until;
    bool stop;
    {
      Lock lock(channel.mutex);
      const uint64_t now = now_ns();
      if (now >= channel.next_timer_ns) run_timers_locked(channel, now, later);
      until = channel.next_timer_ns;
      if (!channel.blocked.empty()) until = std::min(until, now + kRetryNs);
      if (drove == Drive::kMore) until = 0;
      stop = channel.stop_thread;
      channel.sleep_until_ns = until;
    }
    later.wake = false;  // this thread is the one that would be woken
    run(channel, later);
    if (stop) break;
    sleep(channel, until);
    Lock lock(channel.mutex);
    channel.sleep_until_ns = 0;
  }
  Lock lock(channel.mutex);
  channel.thread_exited = true;
  channel.changed.notify_all();
}

}  // namespace kvlink
