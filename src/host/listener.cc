#include "listener.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "blob.h"
#include "cma.h"
#include "link.h"

namespace kvlink::host {
namespace {

constexpr uint64_t kHandshakeNs = uint64_t{5} * 1000 * 1000 * 1000;
constexpr size_t kMaxPending = 64;
constexpr int kAcceptsPerEvent = 16;

UniqueFd open_spare() { return UniqueFd(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

}  // namespace

PendingConnection::PendingConnection(Listener &listener, UniqueFd socket, uint64_t expires_ns)
    : listener_(listener), expires_ns_(expires_ns) {
  fd = std::move(socket);
}

void PendingConnection::refuse() {
  listener_.engine().stats().auth_failures.fetch_add(1, std::memory_order_relaxed);
  listener_.forget(this);
}

// True when all of the message is there. A message-preserving socket gives all or a wrong size at once.
bool PendingConnection::receive(void *message, size_t size) {
  const ssize_t got = recv(fd.get(), static_cast<char *>(message) + received_, size - received_, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (got > 0) received_ += static_cast<size_t>(got);
  const bool whole_messages = listener_.kind() == StreamKind::kLocal;
  if (got <= 0 || (whole_messages && received_ != size)) {
    refuse();
    return false;
  }
  return received_ == size;
}

void PendingConnection::on_events(uint32_t) {
  if (step_ == Step::kHello && receive(&hello_, sizeof hello_)) {
    received_ = 0;
    on_hello();
  } else if (!dead && step_ == Step::kProof && receive(&proof_, sizeof proof_)) {
    on_proof();
  }
}

bool PendingConnection::reply(const void *message, size_t size) {
  // A fresh socket has room for these few bytes; one that has not belongs to nobody who reads.
  return send(fd.get(), message, size, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

void PendingConnection::on_hello() {
  SessionId session;
  std::memcpy(session.data(), hello_.session, session.size());
  const bool well_formed = hello_.magic == Hello::kMagic && hello_.version == kWireVersion &&
                           hello_.kind == static_cast<uint32_t>(listener_.kind());
  Link *link = well_formed ? listener_.engine().find_acceptor(session) : nullptr;
  if (link == nullptr || !link->expects(hello_)) return refuse();
  challenge_ = Challenge{};
  challenge_.magic = Challenge::kMagic;
  if (!random_bytes(challenge_.nonce, sizeof challenge_.nonce)) return refuse();
  challenge_.proof = server_proof(link->params().session_key, hello_, challenge_);
  if (!reply(&challenge_, sizeof challenge_)) return refuse();
  step_ = Step::kProof;
}

void PendingConnection::on_proof() {
  SessionId session;
  std::memcpy(session.data(), hello_.session, session.size());
  Link *link = listener_.engine().find_acceptor(session);
  // Asked again: between the two messages the link may have gone, or another connection taken this place.
  if (link == nullptr || !link->expects(hello_) || proof_.magic != Proof::kMagic ||
      !equal_digests(proof_.proof, client_proof(link->params().session_key, hello_, challenge_, proof_))) {
    return refuse();
  }
  admit(link);
}

void PendingConnection::admit(Link *link) {
  const bool local = listener_.kind() == StreamKind::kLocal;
  const pid_t pid = local ? peer_process(fd.get()) : 0;
  Ready ready{};
  ready.magic = Ready::kMagic;
  ready.cma_works = local && cma_probe(pid, proof_.probe) ? 1 : 0;
  ready.probe = link->engine().probe_target();
  if (!reply(&ready, sizeof ready)) return refuse();
  // From the pending connection's watch to the stream's: the descriptor leaves the epoll set in between.
  UniqueFd socket(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  listener_.forget(this);
  Failure failure = make_failure(KVL_NO_RESOURCE, "fcntl", "no descriptor left for a data connection");
  if (socket) {
    failure = local ? link->attach_local(std::move(socket), pid, ready.cma_works == 1)
                    : link->attach_stream(hello_, std::move(socket));
  }
  if (!failure.ok()) link->bring_down(failure);
}

Listener::Listener(Engine &engine, StreamKind kind, UniqueFd socket)
    : engine_(engine), kind_(kind), spare_(open_spare()) {
  fd = std::move(socket);
}

void Listener::on_events(uint32_t) {
  for (int i = 0; i < kAcceptsPerEvent; ++i) {
    UniqueFd socket(accept4(fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno == EMFILE || errno == ENFILE) {
        spare_.reset();
        UniqueFd turned_away(accept4(fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
        turned_away.reset();
        spare_ = open_spare();
      }
      break;
    }
    // Room for newcomers is made at the cost of the oldest: a real peer is done within two round trips.
    if (pending_.size() >= kMaxPending) forget(pending_.front().get());
    auto connection = std::make_unique<PendingConnection>(*this, std::move(socket), now_ns() + kHandshakeNs);
    if (engine_.watch(connection.get(), EPOLLIN).ok()) pending_.push_back(std::move(connection));
  }
  note_expiry();
}

void Listener::forget(PendingConnection *connection) {
  const auto found = std::find_if(pending_.begin(), pending_.end(),
                                  [connection](const auto &item) { return item.get() == connection; });
  if (found == pending_.end()) return;
  engine_.bury(std::move(*found));
  pending_.erase(found);
  note_expiry();
}

void Listener::expire() {
  if (next_expiry_ns_.load() > now_ns()) return;
  while (!pending_.empty() && pending_.front()->expires_ns() <= now_ns()) {
    engine_.stats().auth_failures.fetch_add(1, std::memory_order_relaxed);
    forget(pending_.front().get());
  }
  note_expiry();
}

void Listener::note_expiry() { next_expiry_ns_.store(pending_.empty() ? UINT64_MAX : pending_.front()->expires_ns()); }

uint64_t Listener::next_expiry_ms() const {
  const uint64_t at = next_expiry_ns_.load();
  if (at == UINT64_MAX) return UINT64_MAX;
  const uint64_t now = now_ns();
  return at <= now ? 0 : (at - now + 999999) / 1000000;
}

}  // namespace kvlink::host
