#include "hccl_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "hccl_refused.h"

namespace cann_sim::hccl {
namespace {

constexpr int kSliceMs = 20;  // how often a waiting call looks again

bool wait_for(int fd, short events, const Deadline &deadline) {
  while (!deadline.passed()) {
    pollfd item{fd, events, 0};
    const int ready = poll(&item, 1, deadline.left_ms(kSliceMs));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) refuse_closed();
  }
  return false;
}

}  // namespace

void refuse_closed() { throw Refused(16, HCCL_E_TCP_TRANSFER, "socket recv 228205: the peer closed the connection"); }
void refuse_late() { throw Refused(16, HCCL_E_TIMEOUT, "EI0006: getting a socket timed out"); }

int Deadline::left_ms(int cap) const {
  if (for_ever_) return cap;
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(end_ - std::chrono::steady_clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, cap));
}

Socket &Socket::operator=(Socket &&other) noexcept {
  const int next = other.fd_.exchange(-1);
  const int before = fd_.exchange(next);
  if (before >= 0) ::close(before);
  return *this;
}

void Socket::close() {
  const int before = fd_.exchange(-1);
  if (before >= 0) ::close(before);
}

void Socket::shut_down() const { ::shutdown(fd_, SHUT_RDWR); }

bool Socket::peer_closed() const {
  pollfd item{fd_, POLLIN | POLLRDHUP, 0};
  if (item.fd < 0) return true;
  return poll(&item, 1, 0) > 0 && (item.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

void Socket::send_all(const void *bytes, std::size_t size, const Deadline &deadline) const {
  const auto *at = static_cast<const char *>(bytes);
  while (size > 0) {
    const ssize_t sent = ::send(fd_, at, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      at += sent;
      size -= static_cast<std::size_t>(sent);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(fd_, POLLOUT, deadline)) refuse_late();
    } else if (errno != EINTR) {
      refuse_closed();
    }
  }
}

void Socket::receive_all(void *bytes, std::size_t size, const Deadline &deadline) const {
  auto *at = static_cast<char *>(bytes);
  while (size > 0) {
    const ssize_t got = ::recv(fd_, at, size, MSG_DONTWAIT);
    if (got > 0) {
      at += got;
      size -= static_cast<std::size_t>(got);
    } else if (got == 0) {
      refuse_closed();
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(fd_, POLLIN, deadline)) refuse_late();
    } else if (errno != EINTR) {
      refuse_closed();
    }
  }
}

}  // namespace cann_sim::hccl
