// A link's life before and beside its transfers: opening, describing, importing regions, taking submits.
#include "link.h"

#include <sys/eventfd.h>

#include <cerrno>
#include <cinttypes>
#include <utility>

#include "ascend/streams.h"
#include "ascend/wire.h"
#include "session.h"

namespace kvlink::hixl_provider {
namespace {

Failure reconnect(const char *whose) {
  return make_failure(KVL_STATE, "submit",
                      "memory of %s was registered after this link was connected, and HIXL tells the two sides of each "
                      "other's memory when they connect: close the peer and reconnect",
                      whose);
}

}  // namespace

Link::Link(Engine &engine) : engine_(engine), hixl_(engine.hixl()) {}

Link::~Link() = default;

Failure Link::open(const kvl_link_params &params) {
  interrupt_.reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!interrupt_) return ascend::errno_failure(KVL_NO_RESOURCE, errno, "eventfd", "no descriptor for the link");
  return engine_.staging().open_link(params, remotes_, *this, &staging_);
}

void Link::introduce() {
  const std::lock_guard<std::mutex> lock(describe_mutex_);
  if (described_) return;
  const ascend::Bindings registered = engine_.memory().bind();
  engine_.introduce(&self_, registered.sequence());
  for (const std::shared_ptr<ascend::Region> &region : registered.regions()) {
    if (region->kind == KVL_MEMORY_DEVICE && region->address % ascend::kHugePage != 0) {
      self_.unaligned_device = region->address;
    }
  }
  if (staging_ != nullptr) staging_->describe(&self_.staging);
  described_ = true;
}

Failure Link::describe(void *buffer, uint64_t *length) {
  introduce();
  return ascend::export_bytes(&self_, sizeof self_, buffer, length, "link_describe");
}

Failure Link::open_remote(uint32_t rmem, const void *blob, uint64_t length) {
  ascend::RegionBlob parsed{};
  const Failure failure = ascend::parse_region_blob(blob, length, &parsed);
  if (!failure.ok()) return failure;
  if (type_ == ascend::LinkType::kHccs && parsed.kind == KVL_MEMORY_HOST && parsed.staged == 0) {
    return make_failure(KVL_UNSUPPORTED, "rmem_open",
                        "host memory of a peer cannot be reached over HCCS, only device memory can: use RoCE "
                        "(option link=roce with HCCL_INTRA_ROCE_ENABLE=1 on both sides), or option host_staging there");
  }
  auto remote = std::make_shared<ascend::RemoteRegion>();
  remote->handle = rmem;
  remote->access = parsed.access;
  remote->kind = parsed.kind;
  remote->address = parsed.address;
  remote->length = parsed.length;
  remote->staged = parsed.staged != 0;
  remote->peer_mem = parsed.mem;
  remote->sequence = parsed.sequence;
  if (!remotes_.insert(std::move(remote))) {
    return make_failure(KVL_INVALID, "rmem_open", "handle 0x%08x is open already", rmem);
  }
  return {};
}

kvl_status Link::submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream, uint64_t tag,
                        kvl_error *err) {
  if (!connected_.load(std::memory_order_acquire)) {
    return report(make_failure(KVL_STATE, "submit", "the link is not connected"), err);
  }
  if (down_.load(std::memory_order_acquire)) return report(down_reason_, err);
  if (accepted_.load(std::memory_order_relaxed) >= engine_.settings().max_in_flight) return KVL_AGAIN;
  ascend::RangePlan plan;
  Failure failure = ascend::plan_ranges(engine_.memory().regions(), remotes_, operation, ranges, count, &plan);
  if (!failure.ok()) return report(failure, err);
  if (plan.newest_local > bindings_.sequence() || plan.newest_remote > peer_.sequence) {
    ++engine_.stats().late_memory_refused;
    return report(reconnect(plan.newest_local > bindings_.sequence() ? "this side" : "the peer"), err);
  }
  if (plan.host_memory && type_ == ascend::LinkType::kHccs && engine_.device().soc() == ascend::SocFamily::kA2) {
    return report(
        make_failure(KVL_UNSUPPORTED, "submit",
                     "HCCS on %s moves device memory only, and this transfer has host memory on this side: use "
                     "RoCE (option link=roce with HCCL_INTRA_ROCE_ENABLE=1)",
                     engine_.device().soc_name().c_str()),
        err);
  }
  if (plan.staged) {
    if (stream != 0) {
      return report(make_failure(KVL_UNSUPPORTED, "submit",
                                 "a transfer that goes through the host staging area takes no stream: synchronise it "
                                 "before the call"),
                    err);
    }
    failure = staging_->admit(plan);
    if (!failure.ok()) return report(failure, err);
    staging_->enqueue(operation, ranges, count, tag, plan.bytes);
    engine_.wake();
    return KVL_OK;
  }
  std::list<Job> job(1);
  job.front().tag = tag;
  job.front().operation = operation;
  job.front().bytes = plan.bytes;
  job.front().cursor = ascend::RangeCursor(ranges, count);
  if (stream != 0) {
    const ascend::ContextGuard guard = engine_.device().enter();
    failure = guard.ok() ? ascend::record_caller(hixl_->acl(), reinterpret_cast<ascend::aclrtStream>(stream),
                                                 &job.front().event)
                         : guard.failure();
    if (!failure.ok()) return report(failure, err);
    ++engine_.stats().deferred;
  }
  accepted_.fetch_add(1, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    inbox_.splice(inbox_.end(), job);
    has_inbox_.store(true, std::memory_order_release);
  }
  engine_.wake();
  return KVL_OK;
}

void Link::cancel(uint64_t tag) {
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    cancels_.push_back(tag);
    has_inbox_.store(true, std::memory_order_release);
  }
  engine_.wake();
}

}  // namespace kvlink::hixl_provider
