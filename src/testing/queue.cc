#include "queue.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "objects.h"

namespace kvlink_hook {

bool Queue::Begin(uint64_t tag, HookLink *link, uint32_t depth) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (depth != 0 && out_.size() >= depth) return false;
  out_[tag] = link;
  return true;
}

void Queue::Forget(uint64_t tag) {
  std::lock_guard<std::mutex> lock(mutex_);
  out_.erase(tag);
}

HookLink *Queue::LinkOf(uint64_t tag) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = out_.find(tag);
  return found == out_.end() ? nullptr : found->second;
}

void Queue::Defer(const DeferredSubmit &submit) {
  std::lock_guard<std::mutex> lock(mutex_);
  deferred_.push_back(submit);
}

void Queue::Hold(const kvl_completion &completion, HookLink *link, Clock::time_point due) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_.push_back({due, link, completion});
}

void Queue::HoldLocked(uint64_t tag, HookLink *link, kvl_status status, const char *site, const char *message,
                       int64_t vendor_code, Clock::time_point due) {
  kvl_completion completion{};
  completion.tag = tag;
  completion.status = status;
  completion.vendor_code = vendor_code;
  std::snprintf(completion.site, sizeof(completion.site), "%s", site);
  std::snprintf(completion.message, sizeof(completion.message), "%s", message);
  held_.push_back({due, link, completion});
}

bool Queue::IsSilent(uint64_t tag) {
  std::lock_guard<std::mutex> lock(mutex_);
  return silent_.erase(tag) != 0;
}

bool Queue::Cancel(uint64_t tag) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = deferred_.begin(); it != deferred_.end(); ++it) {
    if (it->tag != tag || it->silent) continue;
    HookLink *const link = it->link;
    deferred_.erase(it);
    HoldLocked(tag, link, KVL_CANCELLED, "hook:cancel", "cancelled before it reached the provider", 0, Clock::now());
    return true;
  }
  return false;
}

void Queue::EndLink(HookLink *link) {
  std::lock_guard<std::mutex> lock(mutex_);
  link->ending = true;
  const auto now = Clock::now();
  for (auto it = deferred_.begin(); it != deferred_.end();) {
    if (it->link != link) {
      ++it;
      continue;
    }
    if (!it->silent) {
      HoldLocked(it->tag, link, KVL_LINK_DOWN, "hook:link_close",
                 "the link was closed before the submit was carried out", 0, now);
    }
    it = deferred_.erase(it);
  }
  for (Held &held : held_) {
    if (held.link == link) held.due = now;
  }
}

void Queue::SubmitDue(const kvl_provider &provider) {
  // The lock stays held over the provider's submit, which never blocks: so EndLink cannot close a link under it.
  std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  for (auto it = deferred_.begin(); it != deferred_.end();) {
    if (it->due > now) {
      ++it;
      continue;
    }
    kvl_completion done{};
    kvl_error error{};
    error.struct_size = sizeof(error);
    const kvl_status status =
        provider.submit(it->link->inner, it->operation, it->ranges, it->count, it->stream, it->tag, &done, &error);
    if (status == KVL_AGAIN) {
      it->due = now + std::chrono::milliseconds(1);
      ++it;
      continue;
    }
    if (it->silent) {
      if (status == KVL_OK) silent_.insert(it->tag);
    } else if (status == KVL_DONE) {
      held_.push_back({now, it->link, done});
    } else if (status != KVL_OK) {
      HoldLocked(it->tag, it->link, status, error.site, error.message, error.vendor_code, now);
    }
    it = deferred_.erase(it);
  }
}

uint32_t Queue::Take(kvl_completion *out, uint32_t room) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  uint32_t count = 0;
  for (auto it = held_.begin(); it != held_.end() && count < room;) {
    if (it->due > now) {
      ++it;
      continue;
    }
    out_.erase(it->completion.tag);
    out[count++] = it->completion;
    it = held_.erase(it);
  }
  return count;
}

bool Queue::Ready() {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  return std::any_of(held_.begin(), held_.end(), [&](const Held &held) { return held.due <= now; }) ||
         std::any_of(deferred_.begin(), deferred_.end(),
                     [&](const DeferredSubmit &submit) { return submit.due <= now; });
}

uint32_t Queue::Bound(uint32_t timeout_ms) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto now = Clock::now();
  auto limit = now + std::chrono::milliseconds(timeout_ms);
  for (const Held &held : held_) limit = std::min(limit, held.due);
  for (const DeferredSubmit &submit : deferred_) limit = std::min(limit, submit.due);
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(limit - now).count();
  return static_cast<uint32_t>(std::clamp<long long>(left, 0, timeout_ms));
}

}  // namespace kvlink_hook
