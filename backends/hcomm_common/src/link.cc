// The life of a link: describe, connect, import the peer's regions, close.
#include "link.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "ascend/wire.h"

namespace kvlink::hcomm {
namespace {

using host::Deadline;

constexpr uint32_t kLeastCloseMs = 200;  // what the vendor gets to destroy a communicator, whatever the grace

Deadline after_ms(uint64_t milliseconds, int interrupt_fd = -1) {
  return {host::now_ns() + milliseconds * 1000000, interrupt_fd};
}

std::string communicator_name(const uint8_t (&session)[16]) {
  char text[48];
  int at = std::snprintf(text, sizeof text, "kvlink_");
  for (const uint8_t byte : session)
    at += std::snprintf(text + at, sizeof text - static_cast<size_t>(at), "%02x", byte);
  return text;
}

}  // namespace

Link::Link(std::shared_ptr<Engine> engine, const kvl_link_params &params)
    : engine_(std::move(engine)), params_(params) {}

Link::~Link() = default;

Failure Link::open(const std::shared_ptr<Engine> &engine, const kvl_link_params &params, std::shared_ptr<Link> *out) {
  std::shared_ptr<Link> link(new Link(engine, params));
  link->interrupt_fd_ = host::UniqueFd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!link->interrupt_fd_) {
    return ascend::errno_failure(KVL_NO_RESOURCE, errno, "eventfd", "no descriptor for the link");
  }
  const Failure failure = engine->staging().open_link(params, link->remotes_, *link, &link->staging_);
  if (!failure.ok()) return failure;
  engine->add_link(link);
  *out = std::move(link);
  return {};
}

// The regions that are registered now are those that this link will have.
void Link::describe_self() {
  const std::lock_guard<std::mutex> lock(describe_mutex_);
  if (described_) return;
  engine_->describe(&self_);
  ascend::Bindings bindings = engine_->memory().bind();
  self_.sequence = bindings.sequence();
  self_.regions = static_cast<uint32_t>(bindings.regions().size());
  for (const auto &region : bindings.regions()) {
    if (region->kind == KVL_MEMORY_DEVICE && region->address % ascend::kHugePage != 0 && self_.unaligned == 0) {
      self_.unaligned = region->address;
    }
  }
  staging_->describe(&self_.staging);
  connection_ = std::make_shared<Connection>(engine_, engine_->vendor(), std::move(bindings));
  described_ = true;
}

Failure Link::describe(void *buffer, uint64_t *length) {
  describe_self();
  return ascend::export_bytes(&self_, sizeof self_, buffer, length, "link_describe");
}

Failure Link::connect(const void *blob, uint64_t length, uint32_t timeout_ms) {
  describe_self();
  Failure failure = parse_link_blob(blob, length, &peer_);
  Topology topology;
  if (failure.ok()) failure = plan_link(self_, peer_, params_.role, &topology);
  if (failure.ok()) {
    type_ = topology.link;
    // Where one side has no memory nothing can ever move, and later memory needs another link: no communicator then.
    if (self_.regions > 0 && peer_.regions > 0)
      failure = run_connect(topology, after_ms(timeout_ms, interrupt_fd_.get()));
  }
  engine_->stats().connect_retries.fetch_add(connection_->retries());
  const std::lock_guard<std::mutex> lock(queue_mutex_);
  if (!failure.ok()) {
    failure_ = failure;
    return failure;
  }
  up_ = true;
  engine_->stats().connects.fetch_add(1);
  return {};
}

Failure Link::run_connect(const Topology &topology, const Deadline &deadline) {
  const std::shared_ptr<Connection> connection = connection_;
  // A call that comes back after it was given up undoes itself: nobody else will.
  const auto late = [connection](const Failure &) {
    static_cast<void>(connection->take_down(after_ms(kLeastCloseMs)));
  };
  Failure failure = engine_->runner().run(
      "HcclCommInitClusterInfoMemConfig", deadline,
      [connection, topology, name = communicator_name(params_.session), deadline] {
        return connection->init(topology, name, deadline);
      },
      late);
  if (!failure.ok()) return failure;
  failure = engine_->runner().run(
      "HcclCommPrepare", deadline, [connection, deadline] { return connection->prepare(deadline); }, late);
  return failure.ok() ? staging_->connect(peer_.staging, deadline) : failure;
}

void Link::interrupt() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(interrupt_fd_.get(), &one, sizeof one);
}

Failure Link::open_remote(uint32_t rmem, const void *blob, uint64_t length) {
  ascend::RegionBlob region;
  const Failure failure = ascend::parse_region_blob(blob, length, &region);
  if (!failure.ok()) return failure;
  if (type_ == ascend::LinkType::kHccs && region.kind == KVL_MEMORY_HOST && region.staged == 0) {
    return make_failure(KVL_UNSUPPORTED, "rmem_open",
                        "the link is HCCS, over which HCCL reaches device memory only, and the peer's region is host "
                        "memory: set HCCL_INTRA_ROCE_ENABLE=1 on both sides, or option host_staging at the peer");
  }
  auto remote = std::make_shared<ascend::RemoteRegion>();
  remote->handle = rmem;
  remote->access = region.access;
  remote->kind = region.kind;
  remote->address = region.address;
  remote->length = region.length;
  remote->staged = region.staged != 0;
  remote->peer_mem = region.mem;
  remote->sequence = region.sequence;
  if (remotes_.insert(std::move(remote))) return {};
  return make_failure(KVL_STATE, "rmem_open", "handle %#x is open already", rmem);
}

// When the vendor does not let go in time, its memory stays bound and in quarantine until it does.
void Link::take_down(uint64_t start_ns, uint32_t grace_ms) {
  const std::shared_ptr<Connection> connection = std::move(connection_);
  if (connection == nullptr) {
    const auto io = engine_->loop().lock();
    staging_->release();
    return;
  }
  const uint64_t spent_ms = (host::now_ns() - start_ns) / 1000000;
  const uint64_t left_ms = std::max<uint64_t>(grace_ms > spent_ms ? grace_ms - spent_ms : 0, kLeastCloseMs);
  // A connect that was given up takes its communicator down when it comes back.
  const bool gone =
      !connection->in_step() && engine_->runner()
                                    .run("HcclCommDestroy", after_ms(left_ms),
                                         [connection, left_ms] { return connection->take_down(after_ms(left_ms)); })
                                    .ok();
  if (gone) {
    const auto io = engine_->loop().lock();
    staging_->release();
    return;
  }
  engine_->stats().links_stuck.fetch_add(1);
  connection->quarantine(engine_->memory().quarantine());
}

void Link::close(uint32_t grace_ms) {
  const uint64_t start = host::now_ns();
  const Failure closed = make_failure(KVL_LINK_DOWN, "link_close", "the link was closed before the transfer was done");
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    up_ = false;
    if (failure_.ok()) failure_ = closed;
  }
  halted_.store(true);
  interrupt();
  fail_queued(closed);
  engine_->loop().wake();
  std::vector<Flight> flights;
  {
    auto io = engine_->loop().lock();
    // What is on its way mostly ends by itself; what does not is stopped.
    idle_changed_.wait_for(io, std::chrono::milliseconds(grace_ms / 3), [this] { return idle(); });
    staging_->stop(closed);
    flights.swap(flights_);
    for (Flight &flight : incoming_) flights.push_back(std::move(flight));
    incoming_.clear();
    for (Flight &flight : flights) stop_flight(std::move(flight), closed);
  }
  take_down(start, grace_ms);
  std::vector<uint64_t> tags;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    for (const auto &item : live_) tags.push_back(item.first);
    live_.clear();
  }
  const Failure stuck = make_failure(KVL_LINK_DOWN, "link_close",
                                     "the device did not stop this transfer within %u ms; its memory stays bound until "
                                     "it does",
                                     grace_ms);
  for (const uint64_t tag : tags) {
    engine_->completions().push(tag, static_cast<uint32_t>(type_), 0, stuck);
    engine_->work().fetch_sub(1);
  }
  engine_->remove_link(this);
  engine_->loop().wake();
}

}  // namespace kvlink::hcomm
