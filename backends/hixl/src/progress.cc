// What the engine's thread does for a link: ask about requests, start batches, end jobs. I/O lock held throughout, the
// device's context current.
#include <algorithm>

#include "ascend/errors.h"
#include "session.h"

namespace kvlink::hixl_provider {
namespace {

using host::now_ns;

Failure down_failure(const Failure &failure) {
  Failure down = failure;
  down.status = KVL_LINK_DOWN;
  return down;
}

}  // namespace

bool Link::progress(uint64_t until_ns) {
  if (closing_) return false;
  if (has_inbox_.load(std::memory_order_acquire)) take_new();
  if (!requests_.empty()) ask_requests(until_ns);
  if (!deferred_.empty()) ask_events();
  bool more = false;
  if (!ready_.empty() && !down_) more = start_jobs(until_ns);
  if (staging_ != nullptr && !down_) more = staging_->progress(until_ns) || more;
  if (!staged_.empty()) more = start_staged(until_ns) || more;
  return more;
}

void Link::take_new() {
  std::list<Job> fresh;
  std::vector<uint64_t> cancels;
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    fresh.splice(fresh.end(), inbox_);
    cancels.swap(cancels_);
    has_inbox_.store(false, std::memory_order_relaxed);
  }
  while (!fresh.empty()) {
    jobs_.splice(jobs_.end(), fresh, fresh.begin());
    Job &job = jobs_.back();
    job.place = std::prev(jobs_.end());
    if (job.event != nullptr) {
      deferred_.push_back(&job);
    } else {
      ready_.push_back(&job);
    }
  }
  for (const uint64_t tag : cancels) {
    const auto found = std::find_if(jobs_.begin(), jobs_.end(), [tag](const Job &job) { return job.tag == tag; });
    if (found == jobs_.end() || found->stopped) continue;
    // What is with the vendor cannot be stopped; the rest is not started.
    fail(*found, make_failure(KVL_CANCELLED, "cancel", "the transfer was cancelled"));
  }
  if (down_) stop_waiting(down_reason_);
}

void Link::ask_requests(uint64_t until_ns) {
  const kvlink_hixl_shim &shim = hixl_->shim();
  for (size_t i = 0; i < requests_.size();) {
    uint32_t state = kWaiting;
    const uint32_t code = shim.transfer_status(hixl_->get(), requests_[i].id, &state);
    // An error is final whatever the state says: 8.5 leaves the state alone when it no longer knows the link.
    if (code == kSuccess && state == kWaiting) {
      ++i;
    } else {
      const Request request = take_request(i);
      Failure failure;
      if (code != kSuccess || state != kCompleted) {
        failure = down_failure(hixl_failure(hixl_->acl(), "Hixl::GetTransferStatus", code == kSuccess ? kFailed : code,
                                            "a transfer with " + session_->name + " failed"));
        lose(failure);
      }
      engine_.loop().note_progress();
      starved_ = false;
      end_request(request, failure);
    }
    if (now_ns() >= until_ns) return;
  }
}

void Link::ask_events() {
  for (size_t i = 0; i < deferred_.size();) {
    Job &job = *deferred_[i];
    ascend::aclrtEventRecordedStatus status = ascend::ACL_EVENT_RECORDED_STATUS_NOT_READY;
    const ascend::aclError code = hixl_->acl().aclrtQueryEventStatus(job.event, &status);
    if (code == ascend::ACL_SUCCESS && status == ascend::ACL_EVENT_RECORDED_STATUS_NOT_READY) {
      ++i;
      continue;
    }
    deferred_.erase(deferred_.begin() + static_cast<std::ptrdiff_t>(i));
    engine_.loop().note_progress();
    drop_event(job);
    if (code == ascend::ACL_SUCCESS) {
      ready_.push_back(&job);
    } else {
      fail(job, ascend::vendor_failure(&hixl_->acl(), ascend::Vendor::kAcl, "aclrtQueryEventStatus", code,
                                       "the work on the caller's stream before the transfer failed"));
    }
  }
}

bool Link::start_jobs(uint64_t until_ns) {
  while (!ready_.empty() && !down_) {
    if (requests_.size() >= kRequestsPerLink || starved_) {
      starved_ = false;  // the next look asks again
      return false;
    }
    Job &job = *ready_.front();
    switch (start_batch(job)) {
      case Started::kNoRoom:
        return false;
      case Started::kNo:
        break;  // it is out of the list, or has ended
      case Started::kYes:
        if (job.cursor.done()) ready_.pop_front();
    }
    if (now_ns() >= until_ns) return !ready_.empty();
  }
  return false;
}

Link::Started Link::start_batch(Job &job) {
  if (engine_.requests_out().load(std::memory_order_relaxed) >= kRequestsPerEngine) return Started::kNoRoom;
  kvlink_hixl_desc *batch = hixl_->shim().batch(session_->remote.get(), kBatch);
  if (batch == nullptr) {
    fail(job, make_failure(KVL_NO_RESOURCE, "batch", "out of memory for %u descriptors", kBatch));
    return Started::kNo;
  }
  const ascend::RangeCursor before = job.cursor;
  uint64_t gone = UINT64_MAX;
  uint32_t count = 0;
  {
    ascend::RegionTable::Reader regions(engine_.memory().regions());
    ascend::RemoteTable::Reader remotes(remotes_);
    job.cursor.next(
        regions, remotes, kBatch,
        [&](const ascend::Descriptor &one) { batch[count++] = {one.local, one.remote, one.length}; }, &gone);
  }
  Failure failure;
  bool out_of_streams = false;
  if (gone != UINT64_MAX || count == 0) {
    failure = make_failure(KVL_INTERNAL, "submit", "range %llu: its region was closed under it",
                           static_cast<unsigned long long>(gone));
  } else {
    failure = transfer(job.operation, &job, 0, count, &out_of_streams);
  }
  if (out_of_streams) {
    job.cursor = before;
    starved_ = true;
    return Started::kNoRoom;
  }
  if (failure.ok()) return Started::kYes;
  fail(job, std::move(failure));
  return Started::kNo;
}

// Starts the batch that was filled. Whatever the vendor answers but success and "no stream" costs the link: descriptors
// of a refused batch may be under way already.
Failure Link::transfer(uint32_t operation, Job *job, uint64_t token, uint32_t count, bool *out_of_streams) {
  const kvlink_hixl_shim &shim = hixl_->shim();
  if (count < kBatch && shim.batch(session_->remote.get(), count) == nullptr) {
    return make_failure(KVL_NO_RESOURCE, "batch", "out of memory");
  }
  requests_.reserve(requests_.size() + 1);
  void *id = nullptr;
  const uint32_t code = shim.transfer(hixl_->get(), session_->remote.get(), operation == KVL_PUT ? 1 : 0, &id);
  if (code == kResourceExhausted) {
    ++engine_.stats().out_of_streams;
    *out_of_streams = true;
    return {};
  }
  if (code != kSuccess) {
    const Failure failure = down_failure(
        hixl_failure(hixl_->acl(), "Hixl::TransferAsync", code,
                     "cannot start a transfer of " + std::to_string(count) + " pieces with " + session_->name));
    lose(failure);
    return failure;
  }
  requests_.push_back({id, job, token});
  engine_.requests_out().fetch_add(1, std::memory_order_relaxed);
  ++engine_.stats().requests;
  engine_.stats().descriptors += count;
  if (job != nullptr) ++job->outstanding;
  return {};
}

// Takes it in any case: a failure would end the staged transfer, and there will be room.
Failure Link::issue(uint32_t operation, const ascend::Descriptor *descriptors, uint64_t count, uint64_t token) {
  if (down_) return down_reason_;
  staged_.push_back({operation, token, std::vector<ascend::Descriptor>(descriptors, descriptors + count)});
  return {};
}

bool Link::start_staged(uint64_t until_ns) {
  while (!staged_.empty() && !down_ && requests_.size() < kRequestsPerLink &&
         engine_.requests_out().load(std::memory_order_relaxed) < kRequestsPerEngine) {
    Staged next = std::move(staged_.front());
    staged_.pop_front();
    kvlink_hixl_desc *batch = hixl_->shim().batch(session_->remote.get(), kBatch);
    Failure failure;
    bool out_of_streams = false;
    if (batch == nullptr) {
      failure = make_failure(KVL_NO_RESOURCE, "batch", "out of memory for %u descriptors", kBatch);
    } else {
      uint32_t count = 0;
      for (const ascend::Descriptor &one : next.descriptors) batch[count++] = {one.local, one.remote, one.length};
      failure = transfer(next.operation, nullptr, next.token, count, &out_of_streams);
    }
    if (out_of_streams) {
      staged_.push_front(std::move(next));
      return false;
    }
    if (!failure.ok()) staging_->batch_done(next.token, failure);
    if (now_ns() >= until_ns) return !staged_.empty();
  }
  return false;
}

void Link::end_staged(const Failure &failure) {
  while (!staged_.empty()) {
    const uint64_t token = staged_.front().token;
    staged_.pop_front();
    staging_->batch_done(token, failure);
  }
}

void Link::end_request(const Request &request, const Failure &failure) {
  if (request.job == nullptr) {
    staging_->batch_done(request.token, failure);
    return;
  }
  Job &job = *request.job;
  --job.outstanding;
  if (failure.ok()) {
    finish_if_done(job);
  } else {
    fail(job, failure);
  }
}

Link::Request Link::take_request(size_t index) {
  const Request request = requests_[index];
  requests_[index] = requests_.back();
  requests_.pop_back();
  engine_.requests_out().fetch_sub(1, std::memory_order_relaxed);
  return request;
}

// Starts nothing more of it; it ends when the vendor has nothing of it any more.
void Link::fail(Job &job, Failure failure) {
  if (job.failure.ok()) job.failure = std::move(failure);
  job.stopped = true;
  unlist(job);
  finish_if_done(job);
}

void Link::unlist(const Job &job) {
  const auto ready = std::find(ready_.begin(), ready_.end(), &job);
  if (ready != ready_.end()) ready_.erase(ready);
  const auto deferred = std::find(deferred_.begin(), deferred_.end(), &job);
  if (deferred != deferred_.end()) deferred_.erase(deferred);
}

void Link::finish_if_done(Job &job) {
  if (job.outstanding != 0 || (!job.stopped && !job.cursor.done())) return;
  drop_event(job);
  if (job.failure.ok()) {
    (job.operation == KVL_PUT ? engine_.stats().put_bytes : engine_.stats().get_bytes) += job.bytes;
  }
  engine_.completions().push(job.tag, type_ == ascend::LinkType::kHccs ? kPathHccs : kPathRoce,
                             job.failure.ok() ? job.bytes : 0, job.failure);
  accepted_.fetch_sub(1, std::memory_order_relaxed);
  jobs_.erase(job.place);
}

// The link is dead: nothing more is started. Requests that are out are still asked about, each ends by itself or with
// the link.
void Link::lose(const Failure &failure) {
  if (down_) return;
  down_reason_ = failure;
  down_.store(true, std::memory_order_release);
  ++engine_.stats().links_lost;
  if (staging_ != nullptr) staging_->stop(failure);
  end_staged(failure);
  has_inbox_.store(true, std::memory_order_release);  // take_new stops what waits
  engine_.loop().wake();
}

void Link::stop_waiting(const Failure &failure) {
  for (auto job = jobs_.begin(); job != jobs_.end();) {
    Job &one = *job++;
    if (!one.stopped && !one.cursor.done()) fail(one, failure);
  }
}

void Link::drop_event(Job &job) {
  if (job.event == nullptr) return;
  engine_.retire_event(job.event);
  job.event = nullptr;
}

// Of a link being closed: asks about what is out and returns how much the vendor still knows.
uint32_t Link::settle() {
  const ascend::ContextGuard guard = hixl_->device().enter();
  for (size_t i = 0; i < requests_.size();) {
    uint32_t state = kWaiting;
    const uint32_t code = hixl_->shim().transfer_status(hixl_->get(), requests_[i].id, &state);
    if (code == kSuccess && state == kWaiting) {
      ++i;
      continue;
    }
    const Request request = take_request(i);
    end_request(request, code == kSuccess && state == kCompleted
                             ? Failure{}
                             : make_failure(KVL_CANCELLED, "link_close", "the link was closed"));
  }
  return static_cast<uint32_t>(requests_.size());
}

}  // namespace kvlink::hixl_provider
