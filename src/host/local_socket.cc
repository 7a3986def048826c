#include "local_socket.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "link.h"

namespace kvlink::host {
namespace {

constexpr int kMessagesPerEvent = 64;

// Receives one message and at most one descriptor. The kernel closes what does not fit.
ssize_t receive_message(int fd, LocalMessage *message, UniqueFd *passed, bool *truncated) {
  iovec iov{message, sizeof *message};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr header{};
  header.msg_iov = &iov;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return got;
  for (cmsghdr *item = CMSG_FIRSTHDR(&header); item != nullptr; item = CMSG_NXTHDR(&header, item)) {
    if (item->cmsg_level == SOL_SOCKET && item->cmsg_type == SCM_RIGHTS && item->cmsg_len >= CMSG_LEN(sizeof(int))) {
      int received = -1;
      std::memcpy(&received, CMSG_DATA(item), sizeof received);
      passed->reset(received);
    }
  }
  *truncated = (header.msg_flags & MSG_TRUNC) != 0;
  return got;
}

}  // namespace

LocalSocket::LocalSocket(Link &link, UniqueFd socket) : link_(link) { fd = std::move(socket); }

void LocalSocket::on_events(uint32_t) {
  for (int i = 0; i < kMessagesPerEvent && !dead; ++i) {
    LocalMessage message{};
    UniqueFd passed;
    bool truncated = false;
    const ssize_t got = receive_message(fd.get(), &message, &passed, &truncated);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got < 0) {
      link_.bring_down(errno_failure(KVL_LINK_DOWN, errno, "recvmsg", "the Unix socket to the peer broke"));
    } else if (got == 0) {
      link_.bring_down(make_failure(KVL_LINK_DOWN, "recvmsg",
                                    "the peer closed its side of the link, or its process "
                                    "ended"));
    } else if (truncated || got != static_cast<ssize_t>(sizeof message) || message.magic != LocalMessage::kMagic ||
               !handle(message, std::move(passed))) {
      link_.engine().stats().protocol_errors.fetch_add(1, std::memory_order_relaxed);
      link_.bring_down(make_failure(KVL_LINK_DOWN, "recvmsg",
                                    "the peer sent a bad message of %zd bytes on the Unix "
                                    "socket",
                                    got));
    }
  }
}

bool LocalSocket::handle(const LocalMessage &message, UniqueFd passed) {
  switch (static_cast<LocalMessageType>(message.type)) {
    case LocalMessageType::kVerdict:
      link_.on_verdict(message.status != 0);
      return true;
    case LocalMessageType::kDescriptorRequest:
      answer(message);
      return true;
    case LocalMessageType::kDescriptorReply: {
      Failure failure;
      if (message.status != KVL_OK || !passed) {
        const kvl_status status = message.status == KVL_DENIED ? KVL_DENIED : KVL_REMOTE;
        failure = make_failure(status, "share", "the peer gave no descriptor for its region %#x (status %d)",
                               message.mem, message.status);
      }
      link_.on_descriptor(message.id, failure, std::move(passed), message.length, message.access);
      return true;
    }
  }
  return false;
}

void LocalSocket::answer(const LocalMessage &request) {
  Region region;
  UniqueFd shared;
  const Failure failure = link_.engine().regions().share(request.mem, &shared, &region);
  if (failure.status == KVL_DENIED) {
    link_.engine().stats().denied_accesses.fetch_add(1, std::memory_order_relaxed);
  }
  LocalMessage reply{};
  reply.magic = LocalMessage::kMagic;
  reply.type = static_cast<uint32_t>(LocalMessageType::kDescriptorReply);
  reply.id = request.id;
  reply.mem = request.mem;
  reply.status = failure.status;
  reply.length = region.length;
  reply.access = region.access;
  const Failure sent = send(reply, shared.get());
  // A peer that asks without reading the answers fills the socket; it gets no more of this side's memory.
  if (!sent.ok()) link_.bring_down(sent);
}

Failure LocalSocket::send(const LocalMessage &message, int passed_fd) {
  iovec iov{const_cast<LocalMessage *>(&message), sizeof message};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &iov;
  header.msg_iovlen = 1;
  if (passed_fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr *item = CMSG_FIRSTHDR(&header);
    item->cmsg_level = SOL_SOCKET;
    item->cmsg_type = SCM_RIGHTS;
    item->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(item), &passed_fd, sizeof passed_fd);
  }
  for (;;) {
    if (sendmsg(fd.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return {};
    if (errno != EINTR) return errno_failure(KVL_LINK_DOWN, errno, "sendmsg", "the Unix socket to the peer broke");
  }
}

ProcessWatch::ProcessWatch(Link &link, int pidfd) : link_(link) { fd.reset(pidfd); }

void ProcessWatch::on_events(uint32_t) {
  link_.bring_down(make_failure(KVL_LINK_DOWN, "pidfd", "the peer's process ended"));
}

pid_t peer_process(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return 0;
  return credentials.pid;  // 0: a process of another PID namespace
}

int open_pidfd(pid_t pid) {
#ifdef SYS_pidfd_open
  if (pid > 0) return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));  // close-on-exec by definition
#else
  static_cast<void>(pid);
#endif
  return -1;
}

}  // namespace kvlink::host
