// The initiator's side of setting a link up: on the caller's thread, with its own deadline, before poll knows it.
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cma.h"
#include "link.h"

namespace kvlink::host {

void Link::interrupt() {
  const std::lock_guard<std::mutex> lock(state_mutex_);
  interrupted_ = true;
  const uint64_t one = 1;
  if (interrupt_fd_) static_cast<void>(write(interrupt_fd_.get(), &one, sizeof one) < 0);
}

Failure Link::connect(const void *data, uint64_t length, uint32_t timeout_ms) {
  LinkBlob peer{};
  Failure failure = parse_link_blob(data, length, &peer);
  if (!failure.ok()) return failure;
  if (params_.role != KVL_ROLE_INITIATOR) {
    return make_failure(KVL_STATE, "link_connect", "only the initiator of a link connects");
  }
  Deadline deadline{now_ns() + uint64_t{timeout_ms} * 1000000, -1};
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    if (connected_) return make_failure(KVL_STATE, "link_connect", "the link is connected already");
    if (interrupted_) return make_failure(KVL_CANCELLED, "link_connect", "interrupted while connecting");
    interrupt_fd_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!interrupt_fd_) return errno_failure(KVL_NO_RESOURCE, errno, "eventfd", "no descriptors left");
    deadline.interrupt_fd = interrupt_fd_.get();
  }
  failure = connect_paths(peer, deadline);
  const std::lock_guard<std::mutex> lock(state_mutex_);
  interrupt_fd_.reset();
  return failure;
}

Failure Link::connect_paths(const LinkBlob &peer, const Deadline &deadline) {
  const Path mine = engine_.options().path;
  const Path theirs = static_cast<Path>(peer.forced_path);
  const bool same_kernel = !engine_.boot_id().empty() && engine_.boot_id() == peer.boot_id;
  bool tcp_needed = true;
  if (mine != Path::kTcp && theirs != Path::kTcp && same_kernel && peer.local_name[0] != '\0') {
    UniqueFd local;
    const Failure reached = connect_local(peer.local_name, deadline, &local);
    if (reached.status == KVL_CANCELLED) return reached;
    // Not reached: another network namespace on the same kernel. TCP is for that.
    if (reached.ok()) {
      const Failure failure = join_local(peer, deadline, std::move(local), &tcp_needed);
      if (!failure.ok()) return failure;
    }
  }
  if (tcp_needed) {
    const auto count = static_cast<uint16_t>(engine_.options().streams);
    for (uint16_t index = 0; index < count; ++index) {
      UniqueFd socket;
      Failure failure = connect_tcp(peer.host, peer.port, deadline, &socket);
      if (!failure.ok()) return failure;
      tune_tcp(socket.get(), engine_.options().peer_timeout_ms);
      Hello hello{};
      hello.kind = static_cast<uint32_t>(StreamKind::kTcp);
      hello.index = index;
      hello.stream_count = count;
      Ready ready{};
      failure = handshake(socket.get(), &hello, deadline, &ready);
      if (!failure.ok()) return failure;
      const Engine::IoLock io(engine_);
      if (down_.load()) return peer_failure();
      failure = attach_stream(hello, std::move(socket));
      if (!failure.ok()) return failure;
    }
  }
  mark_connected();
  return {};
}

// The Unix socket is open: prove, try process_vm_readv both ways, and tell the peer whether TCP streams follow.
Failure Link::join_local(const LinkBlob &peer, const Deadline &deadline, UniqueFd socket, bool *tcp_needed) {
  Hello hello{};
  hello.kind = static_cast<uint32_t>(StreamKind::kLocal);
  Ready ready{};
  Failure failure = handshake(socket.get(), &hello, deadline, &ready);
  if (!failure.ok()) return failure;
  const pid_t pid = peer_process(socket.get());
  const bool cma_works = cma_probe(pid, ready.probe);
  // Each side that chooses by itself needs a way for memory that was not allocated by this provider.
  const bool mine_free = engine_.options().path == Path::kAuto;
  const bool theirs_free = static_cast<Path>(peer.forced_path) == Path::kAuto;
  *tcp_needed = (mine_free && !cma_works) || (theirs_free && ready.cma_works != 1);
  LocalMessage verdict{};
  verdict.magic = LocalMessage::kMagic;
  verdict.type = static_cast<uint32_t>(LocalMessageType::kVerdict);
  verdict.status = *tcp_needed ? 1 : 0;
  const Engine::IoLock io(engine_);
  failure = attach_local(std::move(socket), pid, cma_works);
  if (!failure.ok()) return failure;
  return local_->send(verdict);
}

Failure Link::handshake(int fd, Hello *hello, const Deadline &deadline, Ready *ready) {
  hello->magic = Hello::kMagic;
  hello->version = kWireVersion;
  std::memcpy(hello->session, params_.session, sizeof hello->session);
  if (!random_bytes(hello->nonce, sizeof hello->nonce)) {
    return errno_failure(KVL_INTERNAL, errno, "getrandom", "no random bytes");
  }
  Failure failure = send_all(fd, hello, sizeof *hello, deadline);
  if (!failure.ok()) return failure;
  Challenge challenge{};
  failure = receive_all(fd, &challenge, sizeof challenge, deadline);
  if (!failure.ok()) return failure;
  if (challenge.magic != Challenge::kMagic ||
      !equal_digests(challenge.proof, server_proof(params_.session_key, *hello, challenge))) {
    engine_.stats().auth_failures.fetch_add(1, std::memory_order_relaxed);
    return make_failure(KVL_DENIED, "handshake", "the peer's data listener does not know the session key");
  }
  Proof proof{};
  proof.magic = Proof::kMagic;
  proof.probe = engine_.probe_target();
  proof.proof = client_proof(params_.session_key, *hello, challenge, proof);
  failure = send_all(fd, &proof, sizeof proof, deadline);
  if (!failure.ok()) return failure;
  failure = receive_all(fd, ready, sizeof *ready, deadline);
  if (!failure.ok()) return failure;
  if (ready->magic != Ready::kMagic) return make_failure(KVL_DENIED, "handshake", "the peer's answer is garbage");
  return {};
}

}  // namespace kvlink::host
