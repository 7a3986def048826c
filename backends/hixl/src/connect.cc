// Connecting and disconnecting: vendor calls that block, made on threads that can be given up.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "ascend/errors.h"
#include "session.h"

namespace kvlink::hixl_provider {
namespace {

using host::Deadline;
using host::now_ns;

constexpr uint64_t kMillisecond = 1000000;
// The vendor spends a Connect's timeout up to three times over, one phase after the other, and rounds it up to seconds.
constexpr int kPhases = 3;
constexpr int kShortestConnectMs = 1000;
constexpr uint32_t kMarginMs = 250;
constexpr int kConnectAttempts = 4;
constexpr int kFirstPauseMs = 100;
constexpr uint32_t kDisconnectMs = 1000;
constexpr auto kLookAgain = std::chrono::milliseconds(10);

}  // namespace

Failure Link::connect(const void *blob, uint64_t length, uint32_t timeout_ms) {
  // A little before the core's own deadline, whose error could not say what happened here.
  const uint32_t margin_ms = std::min(timeout_ms / 10, kMarginMs);
  const Deadline deadline{now_ns() + (timeout_ms - margin_ms) * kMillisecond, interrupt_.get()};
  introduce();
  Failure failure = parse_link_blob(blob, length, &peer_);
  if (failure.ok()) failure = check_peers(self_, peer_, &type_);
  if (!failure.ok()) return failure;
  auto session = std::make_shared<Session>();
  session->hixl = hixl_;
  session->name = peer_.engine;
  session->remote = RemoteEngine(hixl_->shim().remote_create(peer_.engine), RemoteDeleter{&hixl_->shim()});
  if (session->remote == nullptr) return make_failure(KVL_NO_RESOURCE, "Hixl::Connect", "out of memory");
  failure = engine_.names().take(session->name, turn(deadline), &session->hold);
  if (!failure.ok()) return with_health(std::move(failure));
  session_ = std::move(session);

  int pause_ms = kFirstPauseMs;
  for (int attempt = 1;; ++attempt) {
    bool again = false;
    failure = connect_once(timeout_ms, deadline, &again);
    if (failure.ok()) break;
    // Communicator init fails for a moment when several processes of a host are in it at once; where it was the peer's
    // half that failed, this side only sees that the peer does not come.
    if (!again || attempt == kConnectAttempts || deadline.remaining_ms() <= kShortestConnectMs) return failure;
    ++engine_.stats().connect_retries;
    const Deadline pause{now_ns() + static_cast<uint64_t>(pause_ms) * kMillisecond, -1};
    if (host::wait_for(interrupt_.get(), POLLIN, pause, "link_connect").ok()) {
      return make_failure(KVL_CANCELLED, "link_connect", "the connect to %s was stopped on request", peer_.engine);
    }
    pause_ms *= 2;
  }
  vendor_connected_ = true;
  if (staging_ != nullptr) {
    failure = staging_->connect(peer_.staging, deadline);
    if (!failure.ok()) return failure;  // link_close takes the vendor's connection down
  }
  ++engine_.stats().connects;
  const auto lock = engine_.loop().lock();
  engine_.add_link(this);
  connected_.store(true, std::memory_order_release);
  return {};
}

Failure Link::connect_once(uint32_t timeout_ms, const Deadline &deadline, bool *again) {
  bindings_ = engine_.memory().bind();  // what is registered now is what this connection will know
  const int32_t vendor_ms = std::max(kShortestConnectMs, deadline.remaining_ms() / kPhases);
  const std::shared_ptr<Session> session = session_;
  // One at a time in a process. A Connect that hangs keeps the lock: everybody after it fails by their own deadline.
  Failure failure = engine_.connector().run_exclusive(
      "Hixl::Connect", turn(deadline),
      [session, vendor_ms, timeout_ms] {
        uint32_t status = session->connect(vendor_ms);
        if (status == kAlreadyConnected) {  // left over from a peer that was there before under this name
          session->disconnect(vendor_ms);
          status = session->connect(vendor_ms);
        }
        if (status == kSuccess) return Failure{};
        return hixl_failure(session->hixl->acl(), "Hixl::Connect", status,
                            "cannot connect to " + session->name + " within " + std::to_string(timeout_ms) + " ms");
      },
      [session](const Failure &result) {
        if (result.ok()) session->disconnect(kDisconnectMs);  // too late: nobody waits for it any more
      });
  *again = failure.code == kFailed || failure.code == kTimeout;
  // A failure without the vendor's code is the runner's: the call is still inside, on a thread that undoes it if it
  // ever returns and keeps the name until then.
  if (!failure.ok() && failure.code == 0) session_ = nullptr;
  if (!failure.ok()) bindings_.drop();
  return failure.ok() ? failure : with_health(std::move(failure));
}

// Until when to wait for what a hanging Connect keeps: not as long as the peer waits, which could only say that nobody
// came.
Deadline Link::turn(const Deadline &deadline) const {
  Deadline until = deadline;
  if (engine_.connector().degraded()) {
    until.at_ns = now_ns() + static_cast<uint64_t>(deadline.remaining_ms()) / 4 * kMillisecond;
  }
  return until;
}

Failure Link::with_health(Failure failure) const {
  const Failure health = engine_.connector().health();
  if (!health.ok()) failure.message = health.message + "; " + failure.message;
  return failure;
}

void Link::interrupt() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(interrupt_.get(), &one, sizeof one);
}

Failure Link::disconnect_once(const Deadline &deadline) {
  const std::shared_ptr<Session> session = session_;
  const int32_t vendor_ms = std::max(1, deadline.remaining_ms());
  return engine_.closer().run("Hixl::Disconnect", deadline, [session, vendor_ms] {
    const uint32_t status = session->disconnect(vendor_ms);
    if (status == kSuccess || status == kNotConnected) return Failure{};
    return hixl_failure(session->hixl->acl(), "Hixl::Disconnect", status, "disconnecting from " + session->name);
  });
}

// Ends this side's connection. The vendor takes its local half down first and then tells the peer, which may be
// stopped: when requests are still out, what counts is that the local half is gone, and the vendor then knows them no
// more.
void Link::disconnect(uint32_t grace_ms) {
  ++engine_.stats().disconnects;
  Deadline deadline{now_ns() + std::max(grace_ms, 1u) * kMillisecond, -1};
  Failure failure = disconnect_once(deadline);
  while (!failure.ok()) {
    {
      const auto lock = engine_.loop().lock();
      if (settle() == 0) break;
    }
    std::this_thread::sleep_for(kLookAgain);  // the vendor has no event for it
    // Still inside the vendor's library: asking it again would only add a second thread there.
    if (failure.code == 0) continue;
    deadline.at_ns = now_ns() + kDisconnectMs * kMillisecond;
    failure = disconnect_once(deadline);
  }
}

void Link::close(uint32_t grace_ms) {
  const Failure closed = make_failure(KVL_CANCELLED, "link_close", "the link was closed");
  const bool connected = connected_.load();
  {
    const auto lock = engine_.loop().lock();
    closing_ = true;
    engine_.remove_link(this);
    if (connected) {
      const ascend::ContextGuard guard = hixl_->device().enter();
      take_new();
      stop_waiting(closed);
    }
    if (staging_ != nullptr) staging_->stop(closed);
    end_staged(closed);
  }
  if (vendor_connected_) disconnect(grace_ms);
  {
    const auto lock = engine_.loop().lock();
    // Nothing of the vendor's moves for this link any more.
    while (!requests_.empty()) end_request(take_request(requests_.size() - 1), down_ ? down_reason_ : closed);
    if (staging_ != nullptr) staging_->release();
  }
  staging_.reset();
  bindings_.drop();
  session_ = nullptr;
  engine_.loop().wake();
}

}  // namespace kvlink::hixl_provider
