#include "socket.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

namespace kvlink::host {
namespace {

constexpr int kBacklog = 128;

void set_int(int fd, int level, int name, int value) {
  // Best effort: a kernel that lacks one of these still moves the bytes.
  static_cast<void>(setsockopt(fd, level, name, &value, sizeof value));
}

socklen_t local_address(const std::string &name, sockaddr_un *address) {
  std::memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  const size_t length = std::min(name.size(), sizeof address->sun_path - 1);
  std::memcpy(address->sun_path + 1, name.data(), length);  // a leading zero byte: the abstract name space
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
}

Failure finish_connect(int fd, const Deadline &deadline, const char *what) {
  const Failure waited = wait_for(fd, POLLOUT, deadline, "connect");
  if (!waited.ok()) return waited;
  int error = 0;
  socklen_t length = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
  if (error != 0) return errno_failure(KVL_LINK_DOWN, error, "connect", "cannot connect to %s", what);
  return {};
}

}  // namespace

void UniqueFd::reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

int Deadline::remaining_ms() const {
  const uint64_t now = now_ns();
  if (now >= at_ns) return 0;
  return static_cast<int>(std::min<uint64_t>((at_ns - now + 999999) / 1000000, INT_MAX));
}

Failure wait_for(int fd, short events, const Deadline &deadline, const char *site) {
  for (;;) {
    pollfd fds[2] = {{fd, events, 0}, {deadline.interrupt_fd, POLLIN, 0}};
    const int left = deadline.remaining_ms();
    const int ready = poll(fds, deadline.interrupt_fd >= 0 ? 2 : 1, left);
    if (ready < 0 && errno != EINTR) return errno_failure(KVL_INTERNAL, errno, "poll", "waiting for a socket failed");
    if (ready > 0 && deadline.interrupt_fd >= 0 && fds[1].revents != 0) {
      return make_failure(KVL_CANCELLED, site, "interrupted while connecting");
    }
    if (ready > 0) return {};
    if (left == 0) {
      return make_failure(KVL_TIMEOUT, site, "the peer did not answer in time; check that it runs and is reachable");
    }
  }
}

Failure send_all(int fd, const void *data, size_t length, const Deadline &deadline) {
  const char *bytes = static_cast<const char *>(data);
  while (length > 0) {
    const ssize_t sent = send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      bytes += sent;
      length -= static_cast<size_t>(sent);
    } else if (errno == EAGAIN) {
      const Failure waited = wait_for(fd, POLLOUT, deadline, "send");
      if (!waited.ok()) return waited;
    } else if (errno != EINTR) {
      return errno_failure(KVL_LINK_DOWN, errno, "send", "the data connection broke during its handshake");
    }
  }
  return {};
}

Failure receive_all(int fd, void *data, size_t length, const Deadline &deadline) {
  char *bytes = static_cast<char *>(data);
  while (length > 0) {
    const ssize_t got = recv(fd, bytes, length, MSG_DONTWAIT);
    if (got > 0) {
      bytes += got;
      length -= static_cast<size_t>(got);
    } else if (got == 0) {
      return make_failure(KVL_DENIED, "recv",
                          "the peer closed the data connection during its handshake; check that "
                          "both sides use the same session");
    } else if (errno == EAGAIN) {
      const Failure waited = wait_for(fd, POLLIN, deadline, "recv");
      if (!waited.ok()) return waited;
    } else if (errno != EINTR) {
      return errno_failure(KVL_LINK_DOWN, errno, "recv", "the data connection broke during its handshake");
    }
  }
  return {};
}

Failure resolve(const std::string &host, uint16_t port, bool passive, std::vector<Address> *addresses) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  const std::string service = std::to_string(port);
  addrinfo *list = nullptr;
  const int status = getaddrinfo(host.c_str(), service.c_str(), &hints, &list);
  if (status != 0) {
    const int code = status == EAI_SYSTEM ? errno : status;
    Failure failure =
        make_failure(KVL_INVALID, "getaddrinfo", "cannot resolve '%.100s': %s", host.c_str(), gai_strerror(status));
    failure.code = code;
    return failure;
  }
  for (const addrinfo *item = list; item != nullptr; item = item->ai_next) {
    Address address;
    std::memcpy(&address.storage, item->ai_addr, item->ai_addrlen);
    address.length = item->ai_addrlen;
    addresses->push_back(address);
  }
  freeaddrinfo(list);
  return {};
}

Failure listen_tcp(const std::string &host, uint16_t port, UniqueFd *listener, uint16_t *bound_port) {
  std::vector<Address> addresses;
  Failure failure = resolve(host, port, true, &addresses);
  if (!failure.ok()) return failure;
  failure = make_failure(KVL_INVALID, "getaddrinfo", "'%.100s' has no address", host.c_str());
  for (const Address &address : addresses) {
    UniqueFd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      failure = errno_failure(KVL_NO_RESOURCE, errno, "socket", "no socket for the data listener");
      continue;
    }
    set_int(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    if (bind(fd.get(), reinterpret_cast<const sockaddr *>(&address.storage), address.length) != 0 ||
        listen(fd.get(), kBacklog) != 0) {
      failure = errno_failure(KVL_INVALID, errno, "bind", "the data listener cannot bind to '%.100s' port %u",
                              host.c_str(), static_cast<unsigned>(port));
      continue;
    }
    sockaddr_storage bound{};
    socklen_t length = sizeof bound;
    if (getsockname(fd.get(), reinterpret_cast<sockaddr *>(&bound), &length) != 0) {
      failure = errno_failure(KVL_INTERNAL, errno, "getsockname", "the data listener has no address");
      continue;
    }
    *bound_port = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6 *>(&bound)->sin6_port
                                                    : reinterpret_cast<sockaddr_in *>(&bound)->sin_port);
    *listener = std::move(fd);
    return {};
  }
  return failure;
}

Failure connect_tcp(const std::string &host, uint16_t port, const Deadline &deadline, UniqueFd *out) {
  std::vector<Address> addresses;
  Failure failure = resolve(host, port, false, &addresses);
  if (!failure.ok()) return failure;
  failure = make_failure(KVL_INVALID, "getaddrinfo", "'%.100s' has no address", host.c_str());
  const std::string what = "the peer's data listener at " + host + " port " + std::to_string(port);
  for (const Address &address : addresses) {
    UniqueFd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      failure = errno_failure(KVL_NO_RESOURCE, errno, "socket", "no socket for a data connection");
      continue;
    }
    if (connect(fd.get(), reinterpret_cast<const sockaddr *>(&address.storage), address.length) != 0) {
      if (errno != EINPROGRESS) {
        failure = errno_failure(KVL_LINK_DOWN, errno, "connect", "cannot connect to %s", what.c_str());
        continue;
      }
      failure = finish_connect(fd.get(), deadline, what.c_str());
      if (failure.status == KVL_TIMEOUT || failure.status == KVL_CANCELLED) return failure;
      if (!failure.ok()) continue;
    }
    *out = std::move(fd);
    return {};
  }
  return failure;
}

void tune_tcp(int fd, uint32_t peer_timeout_ms) {
  set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_int(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_int(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
  set_int(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set_int(fd, IPPROTO_TCP, TCP_KEEPCNT, static_cast<int>(std::max(1u, (peer_timeout_ms + 999) / 1000 - 1)));
  set_int(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(peer_timeout_ms));
}

Failure listen_local(const std::string &name, UniqueFd *listener) {
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return errno_failure(KVL_NO_RESOURCE, errno, "socket", "no Unix socket for the listener");
  sockaddr_un address;
  const socklen_t length = local_address(name, &address);
  if (bind(fd.get(), reinterpret_cast<const sockaddr *>(&address), length) != 0 || listen(fd.get(), kBacklog) != 0) {
    return errno_failure(KVL_NO_RESOURCE, errno, "bind", "the Unix listener cannot bind to @%s", name.c_str());
  }
  *listener = std::move(fd);
  return {};
}

Failure connect_local(const std::string &name, const Deadline &deadline, UniqueFd *out) {
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return errno_failure(KVL_NO_RESOURCE, errno, "socket", "no Unix socket");
  sockaddr_un address;
  const socklen_t length = local_address(name, &address);
  while (connect(fd.get(), reinterpret_cast<const sockaddr *>(&address), length) != 0) {
    // EAGAIN: the listener's backlog is full. There is nothing to wait on, so look again every few milliseconds.
    if (errno != EAGAIN && errno != EINTR) {
      return errno_failure(KVL_LINK_DOWN, errno, "connect", "cannot connect to the peer's Unix socket");
    }
    if (deadline.remaining_ms() == 0) return make_failure(KVL_TIMEOUT, "connect", "the peer's Unix socket is busy");
    pollfd interrupt{deadline.interrupt_fd, POLLIN, 0};
    if (poll(&interrupt, 1, 2) > 0) return make_failure(KVL_CANCELLED, "connect", "interrupted while connecting");
  }
  *out = std::move(fd);
  return {};
}

bool random_bytes(void *out, size_t length) {
  char *bytes = static_cast<char *>(out);
  while (length > 0) {
    const ssize_t got = getrandom(bytes, length, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    bytes += got;
    length -= static_cast<size_t>(got);
  }
  return true;
}

}  // namespace kvlink::host
