// Transfers on the device: issued and watched by poll, in the engine's thread, with the I/O lock held.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "ascend/wire.h"
#include "link.h"

namespace kvlink::hcomm {
namespace {

using ascend::Descriptor;
using ascend::HcclOneSideOpDesc;
using ascend::Lane;

// How long an event may be incomplete before the stream itself is asked: behind a failed operation some events never
// complete.
constexpr uint64_t kLookNs = 100 * 1000 * 1000;
constexpr uint32_t kDrainMs = 100;  // a sync of a stream whose event is complete
constexpr uint32_t kProbeMs = 1;

HcclOneSideOpDesc descriptor_of(const Descriptor &piece) {
  return {reinterpret_cast<void *>(piece.local), reinterpret_cast<void *>(piece.remote), piece.length,
          ascend::HCCL_DATA_TYPE_UINT8};
}

}  // namespace

bool Link::progress(uint64_t until_ns) {
  bool more = false;
  for (size_t i = 0; i < flights_.size();) {
    const Step step = advance(flights_[i], until_ns);
    more |= step == Step::kBusy;
    if (step != Step::kDone) {
      ++i;
      continue;
    }
    flights_[i] = std::move(flights_.back());
    flights_.pop_back();
    engine_->loop().note_progress();
  }
  more |= start_jobs(until_ns);
  more |= staging_->progress(until_ns);
  for (Flight &flight : incoming_) flights_.push_back(std::move(flight));
  incoming_.clear();
  if (idle()) idle_changed_.notify_all();
  return more;
}

std::shared_ptr<Job> Link::take_job() {
  const std::lock_guard<std::mutex> lock(queue_mutex_);
  if (!up_ || queue_.empty()) return nullptr;
  std::shared_ptr<Job> job = std::move(queue_.front());
  queue_.pop_front();
  return job;
}

bool Link::start_jobs(uint64_t until_ns) {
  bool more = false;
  while (flights_.size() < engine_->options().streams + staged_flights_) {
    Flight flight;
    flight.job = take_job();
    if (flight.job == nullptr) return more;
    const Failure failure = engine_->lanes().acquire(&flight.lane);
    if (!failure.ok()) {
      if (failure.status != KVL_AGAIN && flights_.empty() && stopping_ == 0) {
        finish(*flight.job, failure);
        continue;
      }
      const std::lock_guard<std::mutex> lock(queue_mutex_);  // another transfer's end frees one
      queue_.push_front(std::move(flight.job));
      return more;
    }
    connection_->lane_in();
    flights_.push_back(std::move(flight));
    const Step step = advance(flights_.back(), until_ns);
    more |= step == Step::kBusy;
    if (step == Step::kDone) flights_.pop_back();
  }
  return more;
}

Link::Step Link::advance(Flight &flight, uint64_t until_ns) {
  return flight.recorded ? look(flight) : issue_rest(flight, until_ns);
}

uint32_t Link::next_batch(Job &job, HcclOneSideOpDesc *batch) {
  uint32_t count = 0;
  uint64_t gone = UINT64_MAX;
  ascend::RegionTable::Reader locals(engine_->memory().regions());
  ascend::RemoteTable::Reader remotes(remotes_);
  job.cursor.next(
      locals, remotes, engine_->max_batch(), [&](const Descriptor &piece) { batch[count++] = descriptor_of(piece); },
      &gone);
  if (gone != UINT64_MAX) {  // the core promised that this cannot happen
    job.failure =
        make_failure(KVL_INTERNAL, "submit", "a region of range %" PRIu64 " was closed under its transfer", gone);
  }
  return count;
}

Failure Link::issue_batch(Flight &flight) {
  const uint32_t count = next_batch(*flight.job, engine_->batch());
  return count == 0 ? Failure{} : call_batch(flight, engine_->batch(), count);
}

Failure Link::call_batch(Flight &flight, HcclOneSideOpDesc *batch, uint32_t count) {
  const ascend::HcclApi &hccl = engine_->vendor()->hccl;
  const bool put = flight.job->put;
  flight.issued = true;
  const int code = (put ? hccl.HcclBatchPut : hccl.HcclBatchGet)(connection_->comm(), connection_->peer_rank(), batch,
                                                                 count, flight.lane.stream);
  Statistics &stats = engine_->stats();
  stats.batches.fetch_add(1, std::memory_order_relaxed);
  stats.descriptors.fetch_add(count, std::memory_order_relaxed);
  return hccl_result(*engine_->vendor(), put ? "HcclBatchPut" : "HcclBatchGet", code,
                     put ? "cannot write to the peer" : "cannot read from the peer");
}

Link::Step Link::issue_rest(Flight &flight, uint64_t until_ns) {
  Job &job = *flight.job;
  const ascend::AclApi &acl = engine_->vendor()->acl();
  Failure failure;
  if (!flight.issued && job.after != nullptr) {
    const int code = acl.aclrtStreamWaitEvent(flight.lane.stream, job.after);
    if (code != ascend::ACL_SUCCESS) {
      failure = ascend::vendor_failure(&acl, ascend::Vendor::kAcl, "aclrtStreamWaitEvent", code,
                                       "cannot wait for the caller's stream");
    }
    flight.issued = true;
  }
  while (failure.ok() && job.failure.ok() && !job.cursor.done()) {
    if (halted_.load()) {
      job.failure = reason();
    } else if (job.cancelled.load()) {
      job.failure = make_failure(KVL_CANCELLED, "cancel", "cancelled before all of it was issued");
    } else {
      failure = issue_batch(flight);
      if (failure.ok() && host::now_ns() >= until_ns && !job.cursor.done()) return Step::kBusy;
    }
  }
  if (failure.ok()) failure = ascend::record(acl, flight.lane);
  if (!failure.ok()) {
    // What was issued before is on its way; of a refused batch, the descriptors before the refused one.
    stop_flight(std::move(flight), failure);
    return Step::kDone;
  }
  flight.recorded = true;
  flight.look_ns = host::now_ns() + kLookNs;
  return Step::kWaiting;
}

// Complete is not yet success: a failed stream completes its events too. So the drained stream is synchronised, and the
// communicator asked.
Link::Step Link::look(Flight &flight) {
  const ascend::AclApi &acl = engine_->vendor()->acl();
  bool complete = false;
  Failure failure = ascend::query(acl, flight.lane, &complete);
  if (failure.ok() && !complete) {
    const uint64_t now = host::now_ns();
    if (now < flight.look_ns) return Step::kWaiting;
    flight.look_ns = now + kLookNs;
    failure = ascend::drained(acl, flight.lane, kProbeMs);
    if (failure.ok() || failure.code == ascend::ACL_ERROR_RT_STREAM_SYNC_TIMEOUT) return Step::kWaiting;
  } else if (failure.ok()) {
    failure = ascend::drained(acl, flight.lane, kDrainMs);
  }
  if (failure.ok() && engine_->vendor()->hccl.HcclGetCommAsyncError != nullptr) {
    ascend::HcclResult error = ascend::HCCL_SUCCESS;
    const int code = engine_->vendor()->hccl.HcclGetCommAsyncError(connection_->comm(), &error);
    failure = hccl_result(*engine_->vendor(), "HcclGetCommAsyncError", code != 0 ? code : error,
                          "the communicator reports an error");
  }
  if (!failure.ok()) {
    stop_flight(std::move(flight), failure);
    return Step::kDone;
  }
  engine_->lanes().release(flight.lane);
  finish(*flight.job, flight.job->failure);
  connection_->lane_out();
  return Step::kDone;
}

void Link::lose(const Failure &failure) {
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    if (!up_) return;
    up_ = false;
    failure_ = failure;
  }
  halted_.store(true);
  engine_->stats().stream_failures.fetch_add(1, std::memory_order_relaxed);
  fail_queued(failure);
}

void Link::stop_flight(Flight flight, const Failure &failure) {
  Failure reason = failure;
  reason.status = KVL_LINK_DOWN;  // stream and communicator are of no more use
  lose(reason);
  ++stopping_;
  auto self = shared_from_this();
  engine_->spawn([self, connection = connection_, job = std::move(flight.job), lane = flight.lane, reason] {
    // A stream that cannot be destroyed may still move bytes: its job stays, and keeps the communicator's memory.
    if (!self->engine_->lanes().discard(lane).ok()) return;
    const auto io = self->engine_->loop().lock();
    --self->stopping_;
    self->finish(*job, reason);
    connection->lane_out();
    self->idle_changed_.notify_all();
  });
}

Failure Link::issue(uint32_t operation, const Descriptor *descriptors, uint64_t count, uint64_t token) {
  if (halted_.load()) return reason();
  if (staged_flights_ >= engine_->options().streams) {
    return make_failure(KVL_AGAIN, "submit", "%u batches of the staging area are under way", staged_flights_);
  }
  Flight flight;
  Failure failure = engine_->lanes().acquire(&flight.lane);
  if (!failure.ok()) return failure;
  flight.job = std::make_shared<Job>();
  flight.job->tag = token;
  flight.job->put = operation == KVL_PUT;
  flight.job->staged = true;
  connection_->lane_in();
  engine_->work().fetch_add(1);
  ++staged_flights_;
  HcclOneSideOpDesc *batch = engine_->batch();
  for (uint64_t i = 0; i < count; ++i) batch[i] = descriptor_of(descriptors[i]);
  failure = call_batch(flight, batch, static_cast<uint32_t>(count));
  if (failure.ok()) failure = ascend::record(engine_->vendor()->acl(), flight.lane);
  if (!failure.ok()) {
    stop_flight(std::move(flight), failure);
    return {};
  }
  flight.recorded = true;
  flight.look_ns = host::now_ns() + kLookNs;
  incoming_.push_back(std::move(flight));
  return {};
}

}  // namespace kvlink::hcomm
