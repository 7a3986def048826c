#include <sys/socket.h>
#include <sys/types.h>

#include <algorithm>
#include <cerrno>

#include "common.h"
#include "limits.h"

namespace kvlink::limits {
namespace {

// What an exchange sends ahead of its bytes: where and how many, and which way.
struct Request {
  int64_t offset;
  int64_t length;
  int64_t operation;
};

// 0, or a negative errno.
int send_all(int fd, const void *data, size_t length, int flags = 0) {
  const char *from = static_cast<const char *>(data);
  while (length > 0) {
    const ssize_t sent = send(fd, from, length, MSG_NOSIGNAL | flags);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return -errno;
    from += sent;
    length -= static_cast<size_t>(sent);
  }
  return 0;
}

int receive_all(int fd, void *data, size_t length) {
  char *to = static_cast<char *>(data);
  while (length > 0) {
    const ssize_t got = recv(fd, to, length, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) return -EPIPE;
    to += got;
    length -= static_cast<size_t>(got);
  }
  return 0;
}

int serve_one(int fd, char *remote, uint64_t room) {
  Request request{};
  if (const int error = receive_all(fd, &request, sizeof request)) return error;
  const auto offset = static_cast<uint64_t>(request.offset);
  const auto length = static_cast<uint64_t>(request.length);
  if (length > room || offset > room - length) return -ERANGE;
  if (request.operation == KVM_GET) return send_all(fd, remote + offset, length);
  if (const int error = receive_all(fd, remote + offset, length)) return error;
  const char acknowledged = 1;
  return send_all(fd, &acknowledged, 1);
}

int exchange_one(int fd, char *local, const Block &block, int32_t operation) {
  const Request request{block.remote, block.length, operation};
  const auto length = static_cast<size_t>(block.length);
  const bool put = operation == KVM_PUT;
  if (const int error = send_all(fd, &request, sizeof request, put ? MSG_MORE : 0)) return error;
  if (!put) return receive_all(fd, local + block.local, length);
  if (const int error = send_all(fd, local + block.local, length)) return error;
  char acknowledged = 0;
  return receive_all(fd, &acknowledged, 1);
}

}  // namespace
}  // namespace kvlink::limits

KVM_EXPORT double kvm_stream_send(int32_t fd, const char *buffer, uint64_t room, uint64_t bytes, uint64_t chunk) {
  using namespace kvlink::limits;
  const Stopwatch watch;
  for (uint64_t at = 0; bytes > 0;) {
    const uint64_t piece = std::min({chunk, bytes, room - at});
    if (const int error = send_all(fd, buffer + at, piece)) return error;
    bytes -= piece;
    at = at + piece == room ? 0 : at + piece;
  }
  char acknowledged = 0;
  if (const int error = receive_all(fd, &acknowledged, 1)) return error;
  return watch.seconds();
}

KVM_EXPORT double kvm_stream_receive(int32_t fd, char *buffer, uint64_t room, uint64_t bytes, uint64_t chunk) {
  using namespace kvlink::limits;
  const Stopwatch watch;
  for (uint64_t at = 0; bytes > 0;) {
    const ssize_t got = recv(fd, buffer + at, std::min({chunk, bytes, room - at}), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) return -EPIPE;
    bytes -= static_cast<uint64_t>(got);
    at = at + static_cast<uint64_t>(got) == room ? 0 : at + static_cast<uint64_t>(got);
  }
  const double elapsed = watch.seconds();
  const char acknowledged = 1;
  if (const int error = send_all(fd, &acknowledged, 1)) return error;
  return elapsed;
}

KVM_EXPORT double kvm_exchange_client(int32_t fd, char *local, const int64_t *triples, uint64_t count,
                                      int32_t operation, double *seconds) {
  using namespace kvlink::limits;
  const Block *blocks = as_blocks(triples);
  const Stopwatch total;
  for (uint64_t i = 0; i < count; ++i) {
    const Stopwatch watch;
    if (const int error = exchange_one(fd, local, blocks[i], operation)) return error;
    seconds[i] = watch.seconds();
  }
  return total.seconds();
}

KVM_EXPORT double kvm_exchange_server(int32_t fd, char *remote, uint64_t room, uint64_t count) {
  using namespace kvlink::limits;
  const Stopwatch watch;
  for (uint64_t i = 0; i < count; ++i) {
    if (const int error = serve_one(fd, remote, room)) return error;
  }
  return watch.seconds();
}
