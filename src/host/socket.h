// Descriptors, the clock, and the few socket calls that connecting and listening share.
#ifndef KVLINK_HOST_SOCKET_H
#define KVLINK_HOST_SOCKET_H

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "failure.h"

namespace kvlink::host {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd &&other) noexcept : fd_(other.release()) {}
  UniqueFd &operator=(UniqueFd &&other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  UniqueFd(const UniqueFd &) = delete;
  UniqueFd &operator=(const UniqueFd &) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

uint64_t now_ns();

// A moment after which a blocking step gives up, and a descriptor that, once readable, makes it give up sooner.
struct Deadline {
  uint64_t at_ns = 0;
  int interrupt_fd = -1;

  int remaining_ms() const;
};

// Waits until `fd` has one of `events`; TIMEOUT or CANCELLED if not.
Failure wait_for(int fd, short events, const Deadline &deadline, const char *site);
// All of it or a failure; the socket is non-blocking.
Failure send_all(int fd, const void *data, size_t length, const Deadline &deadline);
Failure receive_all(int fd, void *data, size_t length, const Deadline &deadline);

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

// Resolves a name or a numeric IPv4 or IPv6 address for TCP.
Failure resolve(const std::string &host, uint16_t port, bool passive, std::vector<Address> *addresses);
// A listening TCP socket and the port it got.
Failure listen_tcp(const std::string &host, uint16_t port, UniqueFd *listener, uint16_t *bound_port);
Failure connect_tcp(const std::string &host, uint16_t port, const Deadline &deadline, UniqueFd *socket);
// No delay, and a peer that is gone is noticed in about `peer_timeout_ms`.
void tune_tcp(int fd, uint32_t peer_timeout_ms = 3000);

// An abstract Unix socket (message-preserving) under `name`, which has no leading zero byte.
Failure listen_local(const std::string &name, UniqueFd *listener);
Failure connect_local(const std::string &name, const Deadline &deadline, UniqueFd *socket);

// Fills from the kernel's generator; false when it has none.
bool random_bytes(void *out, size_t length);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_SOCKET_H
