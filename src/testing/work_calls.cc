// submit, poll and the sleep between them.
#include <algorithm>
#include <cstdio>
#include <mutex>
#include <vector>

#include "calls.h"

namespace kvlink_hook {
namespace {

constexpr uint32_t kPollRoom = 64;

// Turns a completion into a failing one when its number is up. Returns false when the whole engine goes down instead.
bool Injure(HookEngine *engine, kvl_completion *completion) {
  kvl_status status = KVL_OK;
  uint64_t call = 0;
  if (!engine->faults.Next("poll", &status, &call)) return true;
  if (status == KVL_ENGINE_DOWN) return false;
  completion->status = status;
  completion->vendor_code = kInjectedCode;
  completion->bytes = 0;
  std::snprintf(completion->site, sizeof(completion->site), "hook:poll");
  std::snprintf(completion->message, sizeof(completion->message), "injected failure of completion %llu: %s",
                static_cast<unsigned long long>(call), StatusName(status));
  return true;
}

// Copies of ranges that a lie needs longer than the core keeps them, or other than they are; never freed.
const kvl_range *KeepRanges(const kvl_range *ranges, uint64_t count) {
  static std::mutex mutex;
  static auto *const kept = new std::vector<std::vector<kvl_range>>;
  std::lock_guard<std::mutex> lock(mutex);
  kept->emplace_back(ranges, ranges + count);
  return kept->back().data();
}

// Breaks the contract as told. Returns false when the submit goes on, with `ranges` perhaps replaced.
bool Lied(HookLink *link, uint32_t operation, const kvl_range **ranges, uint64_t count, uint64_t stream, uint64_t tag) {
  HookEngine *const engine = link->engine;
  const Lie lie = engine->settings.lie;
  if (lie == Lie::kNone || lie == Lie::kTwice) return false;
  if (lie == Lie::kShift) {
    auto *changed = const_cast<kvl_range *>(KeepRanges(*ranges, count));
    for (uint64_t index = 0; index < count; ++index) {
      if (changed[index].remote_offset > 0) --changed[index].remote_offset;
    }
    *ranges = changed;
    return false;
  }
  kvl_completion completion{};
  completion.tag = tag;
  for (uint64_t index = 0; index < count; ++index) completion.bytes += (*ranges)[index].length;
  if (lie == Lie::kEarly) {
    constexpr auto kLate = std::chrono::milliseconds(100);
    engine->queue.Defer({Clock::now() + kLate, link, operation, KeepRanges(*ranges, count), count, stream, tag, true});
  }
  engine->queue.Hold(completion, link, Clock::now());
  P().wake(engine->inner);
  return true;
}

kvl_status SubmitNow(HookLink *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                     uint64_t tag, kvl_completion *done, kvl_error *err) {
  HookEngine *const engine = link->engine;
  const Settings &settings = engine->settings;
  if ((engine->caps & (operation == KVL_PUT ? KVL_CAP_PUT : KVL_CAP_GET)) == 0) {
    return Masked(err, operation == KVL_PUT ? "PUT" : "GET");
  }
  if (link->role == KVL_ROLE_ACCEPTOR && (engine->caps & KVL_CAP_ACCEPTOR_SUBMIT) == 0) {
    return Masked(err, "ACCEPTOR_SUBMIT");
  }
  if (!engine->queue.Begin(tag, link, settings.depth)) {
    return Fail(err, KVL_AGAIN, 0, "hook:submit", "the queue is full");
  }
  if (Lied(link, operation, &ranges, count, stream, tag)) return KVL_OK;
  if (settings.defer_ms != 0) {
    const auto due = Clock::now() + std::chrono::milliseconds(settings.defer_ms);
    engine->queue.Defer({due, link, operation, ranges, count, stream, tag, false});
    P().wake(engine->inner);
    return KVL_OK;
  }
  kvl_status status = P().submit(link->inner, operation, ranges, count, stream, tag, done, err);
  if (status == KVL_DONE) {
    if (done->tag != tag) {
      engine->ledger.Violation("provider", "submit returned DONE and did not fill the tag");
      done->tag = tag;
    }
    if (!Injure(engine, done)) {
      engine->down = true;
      P().wake(engine->inner);
      return KVL_OK;
    }
    if (settings.delay_ms == 0) {
      engine->queue.Forget(tag);
      engine->ledger.Completed(*done);
      return KVL_DONE;
    }
    engine->queue.Hold(*done, link, Clock::now() + std::chrono::milliseconds(settings.delay_ms));
    P().wake(engine->inner);
    return KVL_OK;
  }
  if (status != KVL_OK) engine->queue.Forget(tag);
  return status;
}

kvl_status PollOnce(HookEngine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err) {
  const Settings &settings = engine->settings;
  const uint32_t room = *count;
  if (settings.defer_ms != 0 || settings.lie == Lie::kEarly) engine->queue.SubmitDue(P());
  kvl_completion fresh[kPollRoom];
  uint32_t filled = std::min(room, kPollRoom);
  const kvl_status status = P().poll(engine->inner, fresh, &filled, more, err);
  if (status != KVL_OK) return status;
  const auto due = Clock::now() + std::chrono::milliseconds(settings.delay_ms);
  for (uint32_t index = 0; index < filled; ++index) {
    if (engine->queue.IsSilent(fresh[index].tag)) continue;
    if (!Injure(engine, &fresh[index])) {
      engine->down = true;
      continue;
    }
    HookLink *const link = engine->queue.LinkOf(fresh[index].tag);
    const bool ending = link != nullptr && link->ending;
    engine->queue.Hold(fresh[index], link, ending ? Clock::now() : due);
    if (settings.lie == Lie::kTwice) engine->queue.Hold(fresh[index], link, ending ? Clock::now() : due);
  }
  *count = engine->queue.Take(completions, room);
  for (uint32_t index = 0; index < *count; ++index) engine->ledger.Completed(completions[index]);
  if (engine->queue.Ready()) *more = 1;
  return KVL_OK;
}

}  // namespace

kvl_status Submit(kvl_link *handle, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                  uint64_t tag, kvl_completion *done, kvl_error *err) {
  HookLink *const link = Of(handle);
  Ledger &ledger = link->engine->ledger;
  ledger.LinkUse("submit", link);
  ledger.Submitting(link, operation, ranges, count, tag);
  const kvl_status status = Run(link->engine, "submit", link, err,
                                [&] { return SubmitNow(link, operation, ranges, count, stream, tag, done, err); });
  ledger.Submitted(link, tag, status);
  return status;
}

kvl_status Poll(kvl_engine *handle, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  engine->ledger.EngineUse("poll");
  engine->ledger.Enter(&engine->ledger.polling, "poll");
  kvl_status status = KVL_OK;
  if (!engine->down) status = PollOnce(engine, completions, count, more, err);
  if (engine->down) {
    *count = 0;
    status = Fail(err, KVL_ENGINE_DOWN, kInjectedCode, "hook:poll", "injected failure: the engine is down");
  }
  engine->ledger.Leave(&engine->ledger.polling);
  return status;
}

void Wait(kvl_engine *handle, uint32_t timeout_ms) {
  HookEngine *const engine = Of(handle);
  engine->ledger.EngineUse("wait");
  engine->ledger.Enter(&engine->ledger.waiting, "wait");
  P().wait(engine->inner, engine->queue.Bound(timeout_ms));
  engine->ledger.Leave(&engine->ledger.waiting);
}

void Wake(kvl_engine *handle) {
  Of(handle)->ledger.EngineUse("wake");
  P().wake(Of(handle)->inner);
}

}  // namespace kvlink_hook
