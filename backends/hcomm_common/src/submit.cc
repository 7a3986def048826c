// Accepting transfers, cancelling them, and their end: from any thread.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "link.h"

namespace kvlink::hcomm {

Failure Link::check_submit(uint32_t operation, const kvl_range *ranges, uint64_t count, ascend::RangePlan *plan) const {
  if (operation != KVL_PUT && operation != KVL_GET) {
    return make_failure(KVL_INVALID, "submit", "operation %u is neither put (0) nor get (1)", operation);
  }
  const Failure failure = ascend::plan_ranges(engine_->memory().regions(), remotes_, operation, ranges, count, plan);
  if (!failure.ok()) return failure;
  if (plan->newest_local > self_.sequence || plan->newest_remote > peer_.sequence) {
    return make_failure(KVL_STATE, "submit",
                        "%s region was registered after this link was made, and HCCL exchanges memory only then: close "
                        "the peer and reconnect",
                        plan->newest_local > self_.sequence ? "a local" : "the peer's");
  }
  if (plan->host_memory && type_ == ascend::LinkType::kHccs &&
      engine_->vendor()->device->soc() == ascend::SocFamily::kA2) {
    return make_failure(KVL_UNSUPPORTED, "submit",
                        "the link is HCCS, which moves device memory to device memory on this SoC: set "
                        "HCCL_INTRA_ROCE_ENABLE=1 on both sides, or option host_staging");
  }
  return {};
}

kvl_status Link::submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream, uint64_t tag,
                        kvl_completion *done, kvl_error *err) {
  ascend::RangePlan plan;
  Failure failure = check_submit(operation, ranges, count, &plan);
  if (!failure.ok()) return report(failure, err);
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    if (!up_) {
      return report(failure_.ok() ? make_failure(KVL_STATE, "submit", "the link is not connected") : failure_, err);
    }
    if (live_.size() >= engine_->options().max_in_flight) {
      return report(make_failure(KVL_AGAIN, "submit", "%zu transfers of this link are under way", live_.size()), err);
    }
  }
  if (plan.bytes == 0) {
    std::memset(done, 0, sizeof *done);
    done->tag = tag;
    done->path = static_cast<uint32_t>(type_);
    return KVL_DONE;
  }
  if (plan.staged) {
    if (stream != 0) {
      return report(make_failure(KVL_UNSUPPORTED, "submit",
                                 "a transfer through the staging area waits for no stream: synchronise it first"),
                    err);
    }
    failure = staging_->admit(plan);
    if (!failure.ok()) return report(failure, err);
    staging_->enqueue(operation, ranges, count, tag, plan.bytes);
    engine_->note_staged();
    engine_->loop().wake();
    return KVL_OK;
  }
  auto job = std::make_shared<Job>();
  job->tag = tag;
  job->put = operation == KVL_PUT;
  job->bytes = plan.bytes;
  job->cursor = ascend::RangeCursor(ranges, count);
  if (stream != 0) {
    const auto guard = engine_->vendor()->device->enter();
    failure = guard.failure();
    if (failure.ok()) {
      failure = ascend::record_caller(engine_->vendor()->acl(), reinterpret_cast<void *>(stream), &job->after);
    }
    if (!failure.ok()) return report(failure, err);
  }
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    if (live_.count(tag) != 0) failure = make_failure(KVL_INVALID, "submit", "tag %" PRIu64 " is in use", tag);
    if (!up_) failure = failure_;
    if (failure.ok()) {
      live_.emplace(tag, job.get());
      engine_->work().fetch_add(1);
      queue_.push_back(std::move(job));
    }
  }
  if (!failure.ok()) {
    if (job->after != nullptr) {
      const auto guard = engine_->vendor()->device->enter();
      static_cast<void>(engine_->vendor()->acl().aclrtDestroyEvent(job->after));
    }
    return report(failure, err);
  }
  engine_->stats().submits.fetch_add(1, std::memory_order_relaxed);
  engine_->loop().wake();
  return KVL_OK;
}

void Link::cancel(uint64_t tag) {
  std::shared_ptr<Job> dropped;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    const auto found = live_.find(tag);
    if (found != live_.end()) found->second->cancelled.store(true);
    const auto queued = std::find_if(queue_.begin(), queue_.end(), [tag](const auto &job) { return job->tag == tag; });
    if (queued != queue_.end()) {
      dropped = std::move(*queued);
      queue_.erase(queued);
    }
  }
  staging_->cancel(tag);  // unknown to it unless it is one of its own
  if (dropped != nullptr) {
    finish(*dropped, make_failure(KVL_CANCELLED, "cancel", "cancelled before it began"));
  }
  engine_->loop().wake();
}

void Link::fail_queued(const Failure &failure) {
  std::deque<std::shared_ptr<Job>> dropped;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    dropped.swap(queue_);
  }
  for (const std::shared_ptr<Job> &job : dropped) finish(*job, failure);
}

// From any thread: nothing of the job is on a stream any more.
void Link::finish(Job &job, const Failure &failure) {
  if (job.after != nullptr) {
    const auto guard = engine_->vendor()->device->enter();
    static_cast<void>(engine_->vendor()->acl().aclrtDestroyEvent(job.after));
    job.after = nullptr;
  }
  if (job.staged) {
    --staged_flights_;
    staging_->batch_done(job.tag, failure);
    engine_->work().fetch_sub(1);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    if (live_.erase(job.tag) == 0) return;  // the link's close has reported it already
  }
  Statistics &stats = engine_->stats();
  if (failure.ok()) (job.put ? stats.put_bytes : stats.get_bytes).fetch_add(job.bytes, std::memory_order_relaxed);
  if (failure.status == KVL_CANCELLED) stats.cancelled.fetch_add(1, std::memory_order_relaxed);
  engine_->completions().push(job.tag, static_cast<uint32_t>(type_), failure.ok() ? job.bytes : 0, failure);
  engine_->work().fetch_sub(1);
  engine_->loop().wake();
}

Failure Link::reason() {
  const std::lock_guard<std::mutex> lock(queue_mutex_);
  return failure_;
}

}  // namespace kvlink::hcomm
