// Submits that wait before they reach the provider, and completions that wait before they reach the core.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#include "kvlink/provider.h"
#include "rendezvous.h"

namespace kvlink_hook {

struct HookLink;

struct DeferredSubmit {
  Clock::time_point due;
  HookLink *link = nullptr;
  uint32_t operation = 0;
  const kvl_range *ranges = nullptr;
  uint64_t count = 0;
  uint64_t stream = 0;
  uint64_t tag = 0;
  bool silent = false;  // its completion was given already (a lie): none is wanted any more
};

class Queue {
 public:
  // Remembers an accepted submit. False when `depth` submits are out already (0 = no limit).
  bool Begin(uint64_t tag, HookLink *link, uint32_t depth);
  void Forget(uint64_t tag);
  HookLink *LinkOf(uint64_t tag);

  void Defer(const DeferredSubmit &submit);
  void Hold(const kvl_completion &completion, HookLink *link, Clock::time_point due);
  // Whether a completion of the provider belongs to a silent submit; forgets the tag then.
  bool IsSilent(uint64_t tag);
  // Takes a deferred submit back: its completion says CANCELLED. False when it is not here (any more).
  bool Cancel(uint64_t tag);
  // The link closes: deferred submits end with LINK_DOWN, held completions are due at once.
  void EndLink(HookLink *link);
  // Hands the due submits to the provider.
  void SubmitDue(const kvl_provider &provider);
  // Gives due completions and forgets their tags; returns how many.
  uint32_t Take(kvl_completion *out, uint32_t room);
  // Whether a completion is due now.
  bool Ready();
  // The timeout to sleep: until the next thing is due, at most `timeout_ms`.
  uint32_t Bound(uint32_t timeout_ms);

 private:
  struct Held {
    Clock::time_point due;
    HookLink *link;
    kvl_completion completion;
  };
  void HoldLocked(uint64_t tag, HookLink *link, kvl_status status, const char *site, const char *message,
                  int64_t vendor_code, Clock::time_point due);

  std::mutex mutex_;
  std::unordered_map<uint64_t, HookLink *> out_;
  std::set<uint64_t> silent_;
  std::deque<DeferredSubmit> deferred_;
  std::vector<Held> held_;
};

}  // namespace kvlink_hook
