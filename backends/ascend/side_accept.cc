#include "ascend/side_accept.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "ascend/staging_wire.h"

namespace kvlink::ascend {
namespace {

constexpr uint64_t kHandshakeNs = uint64_t{5} * 1000000000u;
constexpr size_t kMostPending = 64;
constexpr int kAcceptsPerEvent = 8;

SessionId session_of(const host::Hello &hello) {
  SessionId session;
  std::memcpy(session.data(), hello.session, session.size());
  return session;
}

}  // namespace

PendingSide::PendingSide(SideListener &listener, UniqueFd socket, uint64_t expires_ns)
    : listener_(listener), expires_ns_(expires_ns) {
  fd = std::move(socket);
}

void PendingSide::refuse() {
  listener_.directory_.refused();
  listener_.forget(this);
}

bool PendingSide::receive(void *message, size_t size) {
  const ssize_t got = recv(fd.get(), static_cast<char *>(message) + received_, size - received_, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (got <= 0) {
    refuse();
    return false;
  }
  received_ += static_cast<size_t>(got);
  return received_ == size;
}

bool PendingSide::reply(const void *message, size_t size) {
  // A fresh socket has room for these few bytes; one that has not belongs to nobody who reads.
  return send(fd.get(), message, size, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

void PendingSide::on_events(uint32_t) {
  if (!greeted_) {
    if (receive(&hello_, sizeof hello_)) on_hello();
  } else if (receive(&proof_, sizeof proof_)) {
    on_proof();
  }
}

void PendingSide::on_hello() {
  received_ = 0;
  greeted_ = true;
  const bool well_formed =
      hello_.magic == host::Hello::kMagic && hello_.version == kStagingWireVersion && hello_.kind == kStagingStream;
  const SessionKey *key = well_formed ? listener_.directory_.find_key(session_of(hello_)) : nullptr;
  if (key == nullptr) return refuse();
  challenge_.magic = host::Challenge::kMagic;
  if (!host::random_bytes(challenge_.nonce, sizeof challenge_.nonce)) return refuse();
  challenge_.proof = host::server_proof(*key, hello_, challenge_);
  if (!reply(&challenge_, sizeof challenge_)) refuse();
}

void PendingSide::on_proof() {
  // Asked again: between the two messages the link may have gone, or another connection taken its place.
  const SessionKey *key = listener_.directory_.find_key(session_of(hello_));
  if (key == nullptr || proof_.magic != host::Proof::kMagic ||
      !host::equal_digests(proof_.proof, host::client_proof(*key, hello_, challenge_, proof_))) {
    return refuse();
  }
  host::Ready ready{};
  ready.magic = host::Ready::kMagic;
  if (!reply(&ready, sizeof ready)) return refuse();
  // From this watch to the link's: the descriptor leaves the loop in between.
  UniqueFd socket(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  const SessionId session = session_of(hello_);
  SideDirectory &directory = listener_.directory_;
  listener_.forget(this);
  if (socket) directory.admit(session, std::move(socket));
}

Failure SideListener::open(const std::string &host) {
  timer_ = std::make_unique<Timer>(*this);
  timer_->fd = UniqueFd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!timer_->fd) return errno_failure(KVL_NO_RESOURCE, errno, "timerfd_create", "no descriptors left");
  Failure failure = host::listen_tcp(host, 0, &fd, &port_);
  if (failure.ok()) failure = loop_.watch(timer_.get(), EPOLLIN);
  return failure.ok() ? loop_.watch(this, EPOLLIN) : failure;
}

void SideListener::on_events(uint32_t) {
  for (int i = 0; i < kAcceptsPerEvent; ++i) {
    UniqueFd socket(accept4(fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) break;
    // Room for newcomers is made at the cost of the oldest: a real peer is done within two round trips.
    if (pending_.size() >= kMostPending) forget(pending_.front().get());
    auto item = std::make_unique<PendingSide>(*this, std::move(socket), now_ns() + kHandshakeNs);
    if (loop_.watch(item.get(), EPOLLIN).ok()) pending_.push_back(std::move(item));
  }
  arm_timer();
}

void SideListener::forget(PendingSide *item) {
  const auto found =
      std::find_if(pending_.begin(), pending_.end(), [item](const auto &entry) { return entry.get() == item; });
  if (found == pending_.end()) return;
  loop_.bury(std::move(*found));
  pending_.erase(found);
}

void SideListener::expire() {
  while (!pending_.empty() && pending_.front()->expires_ns() <= now_ns()) {
    directory_.refused();
    forget(pending_.front().get());
  }
  arm_timer();
}

void SideListener::close() {
  while (!pending_.empty()) forget(pending_.front().get());
  if (timer_ != nullptr) loop_.bury(std::move(timer_));
}

void SideListener::Timer::on_events(uint32_t) {
  uint64_t value;
  static_cast<void>(read(fd.get(), &value, sizeof value) < 0);
  listener_.expire();
}

void SideListener::arm_timer() {
  if (pending_.empty()) return;
  const uint64_t now = now_ns(), at = pending_.front()->expires_ns();
  const uint64_t left = at > now ? at - now : 1;
  itimerspec timer{};
  timer.it_value.tv_sec = static_cast<time_t>(left / 1000000000u);
  timer.it_value.tv_nsec = static_cast<long>(left % 1000000000u);
  static_cast<void>(timerfd_settime(timer_->fd.get(), 0, &timer, nullptr));
}

Failure connect_side(const std::string &host, uint16_t port, const SessionId &session, const SessionKey &key,
                     const Deadline &deadline, UniqueFd *socket) {
  UniqueFd fd;
  Failure failure = host::connect_tcp(host, port, deadline, &fd);
  if (!failure.ok()) return failure;
  host::Hello hello{};
  hello.magic = host::Hello::kMagic;
  hello.version = kStagingWireVersion;
  hello.kind = kStagingStream;
  std::memcpy(hello.session, session.data(), session.size());
  if (!host::random_bytes(hello.nonce, sizeof hello.nonce)) {
    return errno_failure(KVL_UNAVAILABLE, errno, "getrandom", "no random bytes");
  }
  host::Challenge challenge{};
  failure = host::send_all(fd.get(), &hello, sizeof hello, deadline);
  if (failure.ok()) failure = host::receive_all(fd.get(), &challenge, sizeof challenge, deadline);
  if (!failure.ok()) return failure;
  if (challenge.magic != host::Challenge::kMagic ||
      !host::equal_digests(challenge.proof, host::server_proof(key, hello, challenge))) {
    return make_failure(KVL_DENIED, "connect", "whoever answered at %.100s port %u does not know this link's key",
                        host.c_str(), static_cast<unsigned>(port));
  }
  host::Proof proof{};
  proof.magic = host::Proof::kMagic;
  proof.proof = host::client_proof(key, hello, challenge, proof);
  host::Ready ready{};
  failure = host::send_all(fd.get(), &proof, sizeof proof, deadline);
  if (failure.ok()) failure = host::receive_all(fd.get(), &ready, sizeof ready, deadline);
  if (!failure.ok()) return failure;
  if (ready.magic != host::Ready::kMagic) return make_failure(KVL_DENIED, "connect", "the peer's last word is none");
  *socket = std::move(fd);
  return {};
}

}  // namespace kvlink::ascend
