// The engine's objects: channel, peer, transfer.
//
// LOCKS
//   kve_channel::mutex     all bookkeeping; short sections, never held across a provider call or a wait.
//   progress_mutex         one poll at a time; held across provider poll only. The channel's mutex is not taken inside.
//   wake_mutex             keeps the provider engine alive across provider wake.
// A peer's provider submits are serialised by a flag (pumping), not by a lock: whoever finds it set leaves its work in
// the peer's queue for the one that pumps, so no submitter ever waits for another.
//
// LIFE
//   transfer -> peer -> channel are references. A live transfer is also owned by its peer's list, an open peer by its
//   channel's; both circles end when the peer is closed. The engine thread owns a reference to the channel.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#pragma GCC visibility push(default)  // the C API is all that the library exports
#include "engine.h"
#pragma GCC visibility pop
#include "handles.h"
#include "loader.h"
#include "process.h"
#include "ranges.h"
#include "ref.h"

namespace kvlink {

// Why the engine asked a transfer to stop. A later reason never replaces an earlier one, except that a passed deadline
// replaces a cancel that had no effect.
enum class Stop : uint8_t { kNone, kCancel, kRevoke, kTimeout, kPeer };

struct Failure {
  kvl_status status = KVL_OK;
  int64_t vendor_code = 0;
  char site[48] = {};
  char message[448] = {};
};

// Provider calls and wake-ups that were decided under the channel's mutex and are made after it was released.
struct Deferred {
  std::vector<std::pair<Ref<kve_peer>, uint64_t>> cancels;  // peer, tag
  bool wake = false;
  bool closers = false;  // some peer was lost and needs its closing thread

  void cancel(kve_peer *peer, uint64_t tag) noexcept;
};

using Lock = std::unique_lock<std::mutex>;

}  // namespace kvlink

struct kve_transfer final : kvlink::RefCounted {
  kvlink::Ref<kve_peer> peer;
  uint64_t id = 0;
  uint32_t operation = 0;
  uint32_t timeout_ms = 0;
  uint64_t stream = 0;
  uint64_t bytes = 0;
  uint64_t range_count = 0;
  uint64_t start_ns = 0;

  // Guarded by the channel's mutex.
  kvlink::RangeArray ranges;
  std::vector<kvlink::Ref<kvlink::Region>> uses;
  std::vector<uint64_t> tags;  // accepted parts (or one being submitted) that have not completed
  uint64_t cursor = 0;         // ranges before it were handed to the provider
  uint64_t deadline_ns = kvlink::kForever;
  uint64_t bytes_done = 0;
  uint32_t path = 0;
  kvlink::Stop stop = kvlink::Stop::kNone;
  bool dropped = false;  // the rest from cursor on will not be submitted
  bool notify = false;
  bool notified = false;
  bool ended = false;  // its user knows; parts may still be out when the provider hangs
  kvlink::Failure failure;
  kvlink::ListHook<kve_transfer> live_hook;
  kvlink::ListHook<kve_transfer> queue_hook;
  kvlink::ListHook<kve_transfer> notify_hook;

  kve_result result{};            // written once, before done
  std::atomic<uint32_t> done{0};  // a futex
  std::atomic<uint32_t> waiters{0};

  kve_transfer() = default;

 private:
  ~kve_transfer() override = default;
};

struct kve_peer final : kvlink::RefCounted {
  kvlink::Ref<kve_channel> channel;
  kvl_link *link = nullptr;
  std::string id;
  uint32_t role = KVL_ROLE_INITIATOR;
  bool must_connect = false;

  // Guarded by the channel's mutex.
  bool connecting = false;
  bool connected = false;
  bool lost = false;  // no new calls; `reason` says why
  bool closer_started = false;
  bool link_closed = false;
  bool closed = false;  // link closed and every transfer out of the provider
  bool pumping = false;
  bool blocked = false;  // the provider said AGAIN
  uint32_t calls = 0;    // provider calls on the link right now
  uint32_t grace_ms = 0;
  uint64_t force_at_ns = kvlink::kForever;  // when its transfers end even if the provider hangs
  kvlink::Failure reason;
  kvlink::IntrusiveList<kve_transfer, &kve_transfer::live_hook> live;
  kvlink::IntrusiveList<kve_transfer, &kve_transfer::queue_hook> queue;

  kve_peer() = default;

 private:
  ~kve_peer() override = default;
};

struct kve_channel final : kvlink::RefCounted {
  const kve_provider *provider = nullptr;
  const kvl_provider *api = nullptr;
  kvl_engine *engine = nullptr;
  kvl_attr attr{};
  uint64_t fork_generation = 0;
  uint64_t chunk_bytes = 0;  // longest range the provider takes; 0 = any
  uint32_t default_timeout_ms = 0;
  uint32_t cancel_grace_ms = 0;
  int event_fd = -1;
  std::thread thread;

  std::mutex progress_mutex;
  bool polling = true;  // guarded by progress_mutex
  std::mutex wake_mutex;
  bool wakeable = true;  // guarded by wake_mutex

  mutable std::mutex mutex;  // guards everything below
  std::condition_variable changed;
  kvlink::HandleTable local, remote;
  std::set<uint64_t> allocations;
  std::vector<kvlink::Ref<kve_peer>> peers;
  std::vector<kvlink::Ref<kve_peer>> blocked;
  kvlink::IntrusiveList<kve_transfer, &kve_transfer::notify_hook> finished;  // to be drained
  struct TagSlot {
    kvlink::Ref<kve_transfer> transfer;
    uint64_t tag = 0;
  };
  std::vector<TagSlot> tags;
  std::vector<uint32_t> free_tags;
  uint64_t tag_sequence = 0;
  uint64_t next_id = 0;
  uint64_t unknown_completions = 0;
  kve_statistics statistics{};
  uint64_t next_timer_ns = kvlink::kForever;  // no deadline is earlier
  uint64_t sleep_until_ns = 0;                // when the engine thread wakes by itself; 0 while it is awake
  uint32_t calls = 0;                         // API calls inside the provider engine
  uint32_t connects = 0;
  bool closing = false;
  bool closed = false;
  bool released = false;  // nobody asks for finished transfers any more
  bool stop_thread = false;
  bool thread_exited = false;
  kvl_status down = KVL_OK;  // ENGINE_DOWN once the provider said so
  char down_message[448] = {};
  const char *closing_stage = "";

  kve_channel() = default;

  bool forked() const noexcept { return fork_generation != kvlink::fork_generation(); }
  bool can(uint64_t capability) const noexcept { return (attr.caps & capability) != 0; }
  const char *name() const noexcept { return provider->name.c_str(); }

 private:
  ~kve_channel() override;
};

namespace kvlink {

inline void Deferred::cancel(kve_peer *peer, uint64_t tag) noexcept {
  try {
    cancels.emplace_back(Ref<kve_peer>::share(peer), tag);
  } catch (const std::bad_alloc &) {
    // The transfer still has its deadline.
  }
}

// Functions named _locked are called with the channel's mutex held.

// ---- transfer.cc: a transfer's states
void fail_locked(kve_transfer &transfer, kvl_status status, int64_t vendor_code, const char *site, const char *message,
                 Deferred &later) noexcept;
void stop_locked(kve_transfer &transfer, Stop stop, Deferred &later) noexcept;
void finish_if_complete_locked(kve_transfer &transfer) noexcept;
void force_end_locked(kve_peer &peer) noexcept;
void notify_locked(kve_transfer &transfer) noexcept;
uint64_t new_tag_locked(kve_transfer &transfer);  // throws std::bad_alloc
Ref<kve_transfer> take_tag_locked(kve_channel &channel, uint64_t tag) noexcept;
void complete_locked(kve_channel &channel, const kvl_completion &completion, Deferred &later) noexcept;
void release_uses_locked(kve_channel &channel, std::vector<Ref<Region>> &uses) noexcept;
bool wait_transfer(kve_transfer &transfer, uint32_t timeout_ms) noexcept;

// ---- submit.cc
kvl_status submit_transfer(kve_peer &peer, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                           uint32_t timeout_ms, uint32_t flags, kve_transfer **out, kvl_error *err);
void pump(kve_peer &peer, bool retry, Deferred &later) noexcept;

// ---- progress.cc: the engine thread, polling, timers
enum class Drive : uint8_t { kBusy, kIdle, kMore };
Drive drive(kve_channel &channel, bool wait_for_lock) noexcept;
void run_engine(kve_channel &channel) noexcept;
void arm_timer_locked(kve_channel &channel, uint64_t at_ns, Deferred &later) noexcept;
void wake(kve_channel &channel) noexcept;
void run(kve_channel &channel, Deferred &later) noexcept;

// ---- peer.cc
bool enter_locked(kve_peer &peer) noexcept;  // false when lost; a call that entered must leave
void leave_locked(kve_peer &peer) noexcept;
kvl_status lost_error(const kve_peer &peer, kvl_error *err) noexcept;  // with the mutex held
void lose_locked(kve_peer &peer, kvl_status status, int64_t vendor_code, const char *site, const char *message,
                 uint32_t grace_ms, Deferred &later) noexcept;
void start_closers(kve_channel &channel) noexcept;
kvl_status open_peer(kve_channel &channel, const kvl_link_params &params, kve_peer **out, kvl_error *err);
kvl_status describe_peer(kve_peer &peer, void *buffer, uint64_t *length, kvl_error *err);
kvl_status connect_peer(kve_peer &peer, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err);
void interrupt_peer(kve_peer &peer);
kvl_status check_peer(kve_peer &peer, kvl_error *err);
void close_peer(kve_peer &peer, kvl_status status, const char *message, uint32_t grace_ms);
void release_peer(kve_peer &peer);

// ---- memory.cc
kvl_status allocate_memory(kve_channel &channel, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err);
void free_memory(kve_channel &channel, uint64_t address);
kvl_status open_memory(kve_channel &channel, const kvl_mem_desc &desc, uint32_t *mem, kvl_error *err);
kvl_status export_memory(kve_channel &channel, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err);
kvl_status close_memory(kve_channel &channel, uint32_t mem, uint32_t timeout_ms, kvl_error *err);
kvl_status copy_memory(kve_channel &channel, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                       int32_t to_region, kvl_error *err);
kvl_status open_remote(kve_peer &peer, const void *blob, uint64_t blob_length, uint64_t length, uint32_t access,
                       uint32_t timeout_ms, uint32_t *rmem, kvl_error *err);
kvl_status close_remote(kve_peer &peer, uint32_t rmem, uint32_t timeout_ms, kvl_error *err);

// ---- channel.cc
// Marks one API call inside the provider engine, so that closing waits for it. Check ok() first.
class ChannelCall {
 public:
  ChannelCall(kve_channel &channel, kvl_error *err) noexcept;
  ~ChannelCall();
  ChannelCall(const ChannelCall &) = delete;
  ChannelCall &operator=(const ChannelCall &) = delete;
  bool ok() const noexcept { return status_ == KVL_OK; }
  kvl_status status() const noexcept { return status_; }

 private:
  kve_channel &channel_;
  kvl_status status_;
};
kvl_status refuse_closed_locked(const kve_channel &channel, kvl_error *err) noexcept;  // OK when open
kvl_status open_channel(kve_provider &provider, const kve_channel_params &params, kve_channel **out, kvl_error *err);
kvl_status close_channel(kve_channel &channel, uint32_t grace_ms, kvl_error *err);
uint32_t drain_channel(kve_channel &channel, uint64_t *ids, uint32_t capacity) noexcept;
// Nobody will ask any more: lets go of the finished transfers, which own the channel through their peer.
void forget_finished(kve_channel &channel) noexcept;

}  // namespace kvlink
