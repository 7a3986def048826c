// Transfers through the area, cut into steps: copy in, ask, move, tell, copy out. I/O lock held throughout.
#include <algorithm>
#include <cinttypes>

#include "ascend/staging_impl.h"

namespace kvlink::ascend {

bool StagingLink::Impl::progress(uint64_t until_ns) {
  ++busy_;
  take_inbox();
  std::vector<uint64_t> ready;
  for (const auto &item : steps_) {
    if (item.second.phase == Step::Phase::kReady) ready.push_back(item.first);
  }
  for (const uint64_t token : ready) {
    const auto found = steps_.find(token);
    if (found != steps_.end()) issue(found->second);
  }
  const bool more = begin_steps(until_ns);
  --busy_;
  settle();
  return more;
}

void StagingLink::Impl::take_inbox() {
  std::vector<std::unique_ptr<StagedJob>> fresh;
  std::vector<uint64_t> cancels;
  Failure failure;
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    fresh.swap(inbox_);
    cancels.swap(cancels_);
    failure = failure_;
  }
  for (std::unique_ptr<StagedJob> &job : fresh) {
    if (!failure.ok()) {
      job->ended = true;
      job->failure = failure;
    }
    jobs_.push_back(std::move(job));
  }
  for (const uint64_t tag : cancels) {
    for (const std::unique_ptr<StagedJob> &job : jobs_) {
      if (job->tag != tag || job->ended) continue;
      job->ended = true;
      if (job->failure.ok()) job->failure = make_failure(KVL_CANCELLED, "cancel", "cancelled on request");
    }
  }
}

bool StagingLink::Impl::begin_steps(uint64_t until_ns) {
  for (const std::unique_ptr<StagedJob> &job : jobs_) {
    while (!job->ended) {
      if (now_ns() >= until_ns) return true;
      if (!begin_step(*job)) return false;  // parts come back with an event, or with another link's step
    }
  }
  return false;
}

// False when it needs a part that is in use.
bool StagingLink::Impl::begin_step(StagedJob &job) {
  Step step;
  if (!build(job, &step)) return false;
  if (step.batch.empty()) {
    drop_parts(step);
    return true;
  }
  step.job = &job;
  step.token = next_token_++;
  ++job.steps;
  Step &placed = steps_.emplace(step.token, std::move(step)).first->second;
  if (job.operation == KVL_PUT) {
    const Failure failure = placed.copies.empty() ? Failure{}
                                                  : area_.gather(area_.chunks.address(placed.chunk),
                                                                 placed.copies.data(), placed.copies.size());
    if (failure.ok()) {
      issue(placed);
    } else {
      end(placed.token, failure);
    }
  } else if (!placed.table.empty()) {
    ask(placed, SideType::kFetch);
  } else {
    issue(placed);
  }
  return true;
}

// Takes the next pieces of the job. False when the first of them needs a part that is in use; a step without pieces
// means that nothing is left (the job is then ended).
bool StagingLink::Impl::build(StagedJob &job, Step *step) {
  RegionTable::Reader regions(area_.memory.regions());
  RemoteTable::Reader remotes(remotes_);
  const uint64_t most = std::min<uint64_t>(issuer_.max_batch(), kMaxSideEntries);
  uint64_t chunk_used = 0, slot_used = 0;
  uint64_t pieces = 0;
  while (job.next < job.count && pieces < most) {
    const kvl_range &range = job.ranges[job.next];
    if (job.offset == range.length) {
      ++job.next;
      job.offset = 0;
      continue;
    }
    const Region *local = regions.find(range.mem);
    const RemoteRegion *remote = remotes.find(range.rmem);
    if (local == nullptr || remote == nullptr) {
      job.failure =
          make_failure(KVL_STATE, "submit", "range %" PRIu64 ": a region was closed under the transfer", job.next);
      job.ended = true;
      drop_parts(*step);
      step->batch.clear();
      return true;
    }
    uint64_t length = range.length - job.offset;
    if (local->staged) {
      if (step->chunk == kNoPart) step->chunk = area_.chunks.take();
      if (step->chunk == kNoPart) {
        area_.starving = true;
        if (pieces == 0) return false;
        break;
      }
      length = std::min(length, area_.chunks.bytes() - chunk_used);
      if (length == 0) break;
    }
    if (remote->staged) {
      if (step->slot == kNoPart) step->slot = slots_.take();
      if (step->slot == kNoPart) {
        if (pieces > 0) break;
        drop_parts(*step);
        return false;
      }
      length = std::min({length, slots_.bytes() - slot_used, uint64_t{UINT32_MAX}});
    }
    if (length == 0) break;
    Descriptor piece{local->address + range.local_offset + job.offset,
                     remote->address + range.remote_offset + job.offset, length};
    if (local->staged) {
      const uint64_t place = area_.chunks.address(step->chunk) + chunk_used;
      step->copies.push_back({piece.local, length});
      piece.local = place;
      chunk_used += length;
    }
    if (remote->staged) {
      step->table.push_back({range.remote_offset + job.offset, remote->peer_mem, static_cast<uint32_t>(length)});
      piece.remote = slots_.address(step->slot) + slot_used;
      slot_used += length;
    }
    // Parts are packed, so that pieces of many small ranges are one piece for the vendor. Both sides are staged then:
    // registered memory of two regions may adjoin, and a vendor's descriptor must lie in one.
    const bool packed = local->staged && remote->staged && !step->batch.empty() &&
                        step->batch.back().local + step->batch.back().length == piece.local &&
                        step->batch.back().remote + step->batch.back().length == piece.remote;
    if (packed) {
      step->batch.back().length += length;
    } else {
      step->batch.push_back(piece);
    }
    ++pieces;
    job.offset += length;
  }
  if (job.next == job.count) job.ended = true;
  return true;
}

void StagingLink::Impl::issue(Step &step) {
  const uint64_t token = step.token;
  step.phase = Step::Phase::kVendor;
  const Failure failure = issuer_.issue(step.job->operation, step.batch.data(), step.batch.size(), token);
  if (failure.status == KVL_AGAIN) {
    step.phase = Step::Phase::kReady;
    area_.loop.retry_soon();
  } else if (!failure.ok()) {
    end(token, failure);
  }
}

void StagingLink::Impl::batch_done(uint64_t token, const Failure &failure) {
  const auto found = steps_.find(token);
  if (found == steps_.end() || found->second.phase != Step::Phase::kVendor) return;
  if (!failure.ok() || stopped_) {
    end(token, failure.ok() ? check() : failure);
  } else {
    after_vendor(found->second);
  }
  settle();
}

void StagingLink::Impl::after_vendor(Step &step) {
  if (step.job->operation == KVL_PUT) {
    if (!step.table.empty()) {
      ask(step, SideType::kCommit);
    } else {
      end(step.token, {});
    }
    return;
  }
  end(step.token, step.copies.empty()
                      ? Failure{}
                      : area_.scatter(area_.chunks.address(step.chunk), step.copies.data(), step.copies.size()));
}

void StagingLink::Impl::ask(Step &step, SideType type) {
  step.phase = Step::Phase::kAnswer;
  const uint64_t token = step.token;
  SideHeader header{};
  header.magic = SideHeader::kMagic;
  header.type = static_cast<uint16_t>(type);
  header.count = static_cast<uint16_t>(step.table.size());
  header.id = token;
  header.window_offset = slots_.address(step.slot) - peer_window_;
  if (connection_ == nullptr || connection_->lost()) {
    end(token, make_failure(KVL_LINK_DOWN, "staging", "the staging connection is gone"));
    return;
  }
  connection_->send(header, step.table.data());  // a loss ends this step, and every other, through on_lost
}

void StagingLink::Impl::on_frame(const SideHeader &header, const SideEntry *table) {
  if (header.type != static_cast<uint16_t>(SideType::kAnswer)) {
    SideHeader answer{};
    answer.magic = SideHeader::kMagic;
    answer.type = static_cast<uint16_t>(SideType::kAnswer);
    answer.id = header.id;
    const bool commit = header.type == static_cast<uint16_t>(SideType::kCommit);
    answer.status = serve(commit ? Serve::kCommit : Serve::kFetch, header, table);
    connection_->send(answer, nullptr);
    return;
  }
  const auto found = steps_.find(header.id);
  if (found == steps_.end() || found->second.phase != Step::Phase::kAnswer) return;  // of a transfer given up meanwhile
  Step &step = found->second;
  if (header.status != KVL_OK) {
    end(header.id,
        make_failure(header.status == KVL_DENIED ? KVL_DENIED : KVL_REMOTE, "staging",
                     "the peer did not copy %s its staged memory (status %d): check that the region is still "
                     "published there",
                     step.job->operation == KVL_PUT ? "into" : "from", header.status));
  } else if (step.job->operation == KVL_PUT) {
    end(header.id, {});
  } else {
    step.phase = Step::Phase::kReady;  // issued by progress: here no vendor call may be made
  }
  settle();
  area_.loop.wake();  // a slot is free, or a step is ready
}

void StagingLink::Impl::drop_parts(Step &step) {
  if (step.chunk != kNoPart) {
    area_.chunks.give(step.chunk);
    if (area_.starving) area_.loop.wake();
    area_.starving = false;
  }
  if (step.slot != kNoPart) slots_.give(step.slot);
  step.chunk = step.slot = kNoPart;
}

void StagingLink::Impl::end(uint64_t token, const Failure &failure) {
  const auto found = steps_.find(token);
  if (found == steps_.end()) return;
  Step &step = found->second;
  StagedJob &job = *step.job;
  if (!failure.ok()) {
    if (job.failure.ok()) job.failure = failure;
    job.ended = true;
  }
  drop_parts(step);
  --job.steps;
  steps_.erase(found);
}

// Completes the jobs that have nothing left.
void StagingLink::Impl::settle() {
  if (busy_ > 0) return;
  for (auto item = jobs_.begin(); item != jobs_.end();) {
    StagedJob &job = **item;
    if (!job.ended || job.steps > 0) {
      ++item;
      continue;
    }
    if (job.failure.ok()) area_.staged_bytes.fetch_add(job.bytes);
    area_.completions.push(job.tag, area_.path, job.failure.ok() ? job.bytes : 0, job.failure);
    transfers_.fetch_sub(1);
    area_.loop.wake();
    item = jobs_.erase(item);
  }
}

}  // namespace kvlink::ascend
