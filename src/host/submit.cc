// submit: look at the ranges once, move a small batch at once where no peer is needed, queue the rest.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "cma.h"
#include "link.h"

namespace kvlink::host {
namespace {

// Small enough to copy in the caller's thread: a few microseconds.
constexpr uint64_t kInlineBytes = 64 * 1024;
constexpr uint64_t kInlineRanges = 64;
// Below this a transfer fits the caches of whoever reads it next, so ordinary stores serve best.
constexpr uint64_t kTunedBytes = uint64_t{4} << 20;
// Small enough to send from the caller's thread.
constexpr uint64_t kDirectBytes = 64 * 1024;
// So long to send that its first microseconds do not count.
constexpr uint64_t kLongBytes = uint64_t{1} << 20;

}  // namespace

Failure Link::plan_submit(uint32_t operation, const kvl_range *ranges, uint64_t count, Plan *plan) const {
  const uint32_t needed = operation == KVL_PUT ? KVL_ACCESS_WRITE : KVL_ACCESS_READ;
  RegionTable::Reader locals(engine_.regions());
  RemoteTable::Reader remotes(remotes_);
  for (uint64_t i = 0; i < count; ++i) {
    const kvl_range &range = ranges[i];
    const Region *local = locals.find(range.mem);
    const RemoteRegion *remote = remotes.find(range.rmem);
    // The core checked all this; cma and shm have no other guard, so a slip there must not become a stray write.
    if (local == nullptr || remote == nullptr || range.local_offset > local->length ||
        range.length > local->length - range.local_offset || range.remote_offset > remote->length ||
        range.length > remote->length - range.remote_offset) {
      return make_failure(KVL_INVALID, "submit",
                          "range %" PRIu64 ": regions %#x and %#x, offsets %" PRIu64 " and %" PRIu64
                          ", length %" PRIu64,
                          i, range.mem, range.rmem, range.local_offset, range.remote_offset, range.length);
    }
    if ((remote->access & needed) == 0) {
      return make_failure(KVL_DENIED, "submit", "range %" PRIu64 ": the peer's region %#x gives access %u, not %u", i,
                          range.rmem, remote->access, needed);
    }
    if (range.length == 0) continue;
    plan->bytes += range.length;
    ++plan->pieces;
    plan->slowest = std::max(plan->slowest, remote->path);
    (remote->path == Path::kTcp ? plan->tcp : plan->memory) = true;
  }
  return {};
}

kvl_status Link::submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag, kvl_completion *done,
                        kvl_error *err) {
  if (operation != KVL_PUT && operation != KVL_GET) {
    return report(make_failure(KVL_INVALID, "submit", "operation %u", operation), err);
  }
  std::unique_lock<std::mutex> submitting(submit_mutex_);
  if (down_.load() || lost_.load()) return report(peer_failure(), err);
  Plan plan;
  const Failure failure = plan_submit(operation, ranges, count, &plan);
  if (!failure.ok()) return report(failure, err);
  const bool put = operation == KVL_PUT;
  if (!plan.tcp && plan.bytes <= kInlineBytes && plan.pieces <= kInlineRanges) {
    submit_inline(put, ranges, count, plan, tag, done);
    return KVL_DONE;
  }
  auto job = std::make_unique<Job>();
  job->link = this;
  job->tag = tag;
  job->put = put;
  job->ranges = ranges;
  job->count = count;
  job->bytes = plan.bytes;
  job->uses_memory = plan.memory;
  job->uses_tcp = plan.tcp;
  job->slowest = plan.slowest;
  job->tuned = plan.bytes >= kTunedBytes;
  job->piece = plan.bytes / std::max<uint64_t>(plan.pieces, 1);
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    if (down_.load()) return report(failure_, err);
    if (jobs_.count(tag) != 0)
      return report(make_failure(KVL_INVALID, "submit", "tag %" PRIu64 " is in use", tag), err);
    engine_.enqueue(job.get());
    jobs_.emplace(tag, std::move(job));
  }
  engine_.stats().queued_submits.fetch_add(1, std::memory_order_relaxed);
  submitting.unlock();
  if (!plan.memory && plan.bytes >= kLongBytes) {
    engine_.wake_soon();
  } else if (plan.memory || plan.bytes > kDirectBytes || !engine_.try_progress(this)) {
    engine_.wake();
  }
  return KVL_OK;
}

void Link::submit_inline(bool put, const kvl_range *ranges, uint64_t count, const Plan &plan, uint64_t tag,
                         kvl_completion *done) {
  iovec local[kInlineRanges], remote[kInlineRanges];
  Failure failure;
  uint64_t moved = 0;
  {
    RegionTable::Reader locals(engine_.regions());
    RemoteTable::Reader remotes(remotes_);
    uint64_t next = 0;
    while (next < count && failure.ok()) {
      // One run of ranges that go the same way.
      size_t pieces = 0;
      Path path = Path::kShm;
      for (; next < count; ++next) {
        const kvl_range &range = ranges[next];
        if (range.length == 0) continue;
        const RemoteRegion *region = remotes.find(range.rmem);
        if (pieces > 0 && region->path != path) break;
        path = region->path;
        local[pieces] = {locals.find(range.mem)->base + range.local_offset, range.length};
        remote[pieces++] = {region->base + range.remote_offset, range.length};
      }
      if (pieces > 0) failure = move_pieces(path, put, local, remote, pieces, CopyHint::kCached, &moved);
    }
  }
  engine_.stats().inline_submits.fetch_add(1, std::memory_order_relaxed);
  std::memset(done, 0, sizeof *done);
  done->tag = tag;
  done->path = static_cast<uint32_t>(plan.slowest);
  done->bytes = moved;
  if (!failure.ok()) report(failure, done);
}

Failure Link::move_pieces(Path path, bool put, iovec *local, iovec *remote, size_t count, CopyHint hint,
                          uint64_t *moved) {
  uint64_t bytes = 0;
  Failure failure;
  if (path == Path::kShm) {
    for (size_t i = 0; i < count; ++i) bytes += local[i].iov_len;
    copy_pieces(put ? remote : local, put ? local : remote, count, hint);
  } else {
    // The process must be the one that the probe met: a number may be given to another one after its end.
    uint64_t calls = 0;
    failure = peer_lives() ? cma_move(peer_pid_, put, local, remote, count, &bytes, &calls)
                           : make_failure(KVL_LINK_DOWN, "pidfd", "the peer's process %d ended", peer_pid_);
    if (failure.status == KVL_LINK_DOWN) note_lost(failure);
    engine_.stats().process_vm_calls.fetch_add(calls, std::memory_order_relaxed);
  }
  *moved += bytes;
  engine_.stats().bytes[static_cast<uint32_t>(path)].fetch_add(bytes, std::memory_order_relaxed);
  return failure;
}

void Link::run_slice(Job &job, Slice &slice) {
  uint64_t moved = 0;
  const bool tuned = job.tuned && slice.path == Path::kShm;
  const CopyHint hint = tuned ? engine_.tuner().choose(job.piece) : CopyHint::kCached;
  const uint64_t begin = tuned ? now_ns() : 0;
  const Failure failure = move_pieces(slice.path, job.put, slice.local, slice.remote, slice.count, hint, &moved);
  if (tuned) engine_.tuner().note(job.piece, hint, moved, now_ns() - begin);
  job.moved.fetch_add(moved);
  if (!failure.ok()) job.fail(failure);
}

}  // namespace kvlink::host
