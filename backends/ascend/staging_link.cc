// A link's staging: its side connection, and what enters from other threads.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "ascend/staging_impl.h"

namespace kvlink::ascend {

StagingLink::Impl::Impl(StagingArea::Impl &area, const kvl_link_params &params, const RemoteTable &remotes,
                        BatchIssuer &issuer)
    : area_(area),
      params_(params),
      remotes_(remotes),
      issuer_(issuer),
      attached_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  std::memcpy(session_.data(), params.session, session_.size());
}

Failure StagingLink::Impl::open() {
  if (!attached_) return errno_failure(KVL_NO_RESOURCE, errno, "eventfd", "no descriptors left");
  const auto lock = area_.loop.lock();
  if (area_.arena != 0) window_ = area_.windows.take();
  area_.links.push_back(this);
  return {};
}

StagingLink::Impl::~Impl() {
  const auto lock = area_.loop.lock();
  area_.remove(this);
  if (connection_ != nullptr) area_.loop.bury(std::move(connection_));
}

void StagingLink::Impl::describe(StagingBlob *blob) const {
  std::memset(blob, 0, sizeof *blob);
  if (area_.arena == 0) return;
  blob->enabled = 1;
  blob->port = area_.listener->port();
  put_text(blob->host, area_.options.advertise_host);
  if (window_ == kNoPart) return;
  blob->window_address = area_.windows.address(window_);
  blob->window_length = area_.windows.bytes();
}

Failure StagingLink::Impl::connect(const StagingBlob &peer, const Deadline &deadline) {
  const bool here = area_.arena != 0, there = peer.enabled != 0;
  if (!here && !there) return {};
  if (peer.enabled > 1 || !ends(peer.host) || (there && (peer.port == 0 || peer.host[0] == '\0')) ||
      peer.window_address + peer.window_length < peer.window_address) {
    return make_failure(KVL_INVALID, "link_connect", "the peer's staging description has host '%.60s', port %u",
                        peer.host, static_cast<unsigned>(peer.port));
  }
  // The acceptor listens where it can, the initiator otherwise.
  const bool acceptor = params_.role == KVL_ROLE_ACCEPTOR;
  const bool listens = acceptor ? here : !there;
  Failure failure;
  if (listens) {
    failure = host::wait_for(attached_.get(), POLLIN, deadline, "link_connect");
    if (failure.status == KVL_TIMEOUT) failure.message = "the peer's staging connection did not come in time";
  } else {
    UniqueFd socket;
    failure = connect_side(peer.host, peer.port, session_, params_.session_key, deadline, &socket);
    if (failure.ok()) {
      const auto lock = area_.loop.lock();
      attach(std::move(socket));
    }
  }
  if (!failure.ok()) return failure;
  const auto lock = area_.loop.lock();
  peer_window_ = peer.window_address;
  peer_window_bytes_ = peer.window_length;
  const uint64_t slot = std::min(kMaxStepBytes, peer_window_bytes_ / 4 / kPage * kPage);
  if (slot > 0)
    slots_.reset(peer_window_, slot, static_cast<uint32_t>(std::min<uint64_t>(peer_window_bytes_ / slot, 64)));
  peer_serves_.store(slot > 0);
  return check();
}

// I/O lock held.
void StagingLink::Impl::attach(UniqueFd socket) {
  host::tune_tcp(socket.get(), static_cast<uint32_t>(area_.options.peer_timeout_ms));
  connection_ = std::make_unique<SideConnection>(area_.loop, *this, std::move(socket));
  const Failure failure = connection_->start();
  if (!failure.ok()) stop(failure);
  area_.loop.wake();
  const uint64_t one = 1;
  static_cast<void>(write(attached_.get(), &one, sizeof one) < 0);
}

void StagingLink::Impl::on_lost(const Failure &reason) { stop(reason); }

Failure StagingLink::Impl::check() const {
  const std::lock_guard<std::mutex> lock(inbox_mutex_);
  return failure_;
}

Failure StagingLink::Impl::admit(const RangePlan &plan) const {
  const Failure failure = check();
  if (!failure.ok()) return failure;
  if (plan.staged_local && area_.arena == 0) {
    return make_failure(KVL_INTERNAL, "submit", "a staged region without a staging area");
  }
  if (plan.staged_remote && !peer_serves_.load()) {
    return make_failure(
        KVL_UNSUPPORTED, "submit",
        "the peer's staging area has no window left for this link: raise its option host_staging_links, "
        "or close links that are not used");
  }
  if (transfers_.load() >= area_.options.max_in_flight) {
    return make_failure(KVL_AGAIN, "submit", "%u staged transfers are under way", transfers_.load());
  }
  return {};
}

void StagingLink::Impl::enqueue(std::unique_ptr<StagedJob> job) {
  transfers_.fetch_add(1);
  const std::lock_guard<std::mutex> lock(inbox_mutex_);
  inbox_.push_back(std::move(job));
}

void StagingLink::Impl::cancel(uint64_t tag) {
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    cancels_.push_back(tag);
  }
  area_.loop.wake();
}

void StagingLink::Impl::stop(const Failure &reason) {
  {
    const std::lock_guard<std::mutex> lock(inbox_mutex_);
    if (failure_.ok()) failure_ = reason;
  }
  stopped_ = true;
  take_inbox();
  for (const std::unique_ptr<StagedJob> &job : jobs_) {
    job->ended = true;
    if (job->failure.ok()) job->failure = reason;
  }
  // What waits for the peer or for a stream ends now; what the vendor has ends with batch_done.
  std::vector<uint64_t> tokens;
  for (const auto &item : steps_) {
    if (item.second.phase != Step::Phase::kVendor) tokens.push_back(item.first);
  }
  for (const uint64_t token : tokens) end(token, reason);
  settle();
  area_.loop.wake();
}

void StagingLink::Impl::release() {
  if (released_) return;
  released_ = true;
  for (auto &item : steps_) {
    if (item.second.chunk != kNoPart) area_.chunks.give(item.second.chunk);
    item.second.chunk = kNoPart;
  }
  if (window_ != kNoPart) area_.windows.give(window_);
  window_ = kNoPart;
  if (connection_ != nullptr) area_.loop.bury(std::move(connection_));
}

// ---- the public face

StagingLink::StagingLink(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StagingLink::~StagingLink() = default;
void StagingLink::describe(StagingBlob *blob) const { impl_->describe(blob); }
Failure StagingLink::connect(const StagingBlob &peer, const Deadline &deadline) {
  return impl_->connect(peer, deadline);
}
Failure StagingLink::admit(const RangePlan &plan) const { return impl_->admit(plan); }

void StagingLink::enqueue(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag, uint64_t bytes) {
  auto job = std::make_unique<StagedJob>();
  job->operation = operation;
  job->ranges = ranges;
  job->count = count;
  job->tag = tag;
  job->bytes = bytes;
  impl_->enqueue(std::move(job));
}

void StagingLink::cancel(uint64_t tag) { impl_->cancel(tag); }
uint32_t StagingLink::transfers() const { return impl_->transfers(); }
Failure StagingLink::check() const { return impl_->check(); }
bool StagingLink::progress(uint64_t until_ns) { return impl_->progress(until_ns); }
void StagingLink::batch_done(uint64_t token, const Failure &failure) { impl_->batch_done(token, failure); }
void StagingLink::stop(const Failure &reason) { impl_->stop(reason); }
void StagingLink::release() { impl_->release(); }

}  // namespace kvlink::ascend
