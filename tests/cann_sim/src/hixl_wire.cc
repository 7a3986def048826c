#include "hixl_wire.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "hccl_refused.h"

namespace cann_sim::hixl_sim {
namespace {

constexpr std::uint32_t kMagic = 0x6c786968;
constexpr std::uint32_t kMaxPayload = 1 << 20;

struct Header {
  std::uint32_t magic;
  std::uint32_t type;
  std::uint32_t status;
  std::uint32_t bytes;
  std::uint32_t sequence;
};

socklen_t fill(const EngineName &name, sockaddr_storage *out) {
  std::memset(out, 0, sizeof *out);
  auto *v4 = reinterpret_cast<sockaddr_in *>(out);
  auto *v6 = reinterpret_cast<sockaddr_in6 *>(out);
  const std::uint16_t port = htons(static_cast<std::uint16_t>(name.port));  // 70000 wraps, as in the vendor's engine
  if (inet_pton(AF_INET, name.ip.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = port;
    return sizeof *v4;
  }
  inet_pton(AF_INET6, name.ip.c_str(), &v6->sin6_addr);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = port;
  return sizeof *v6;
}

}  // namespace

void send_frame(const Socket &socket, const Frame &frame, const Deadline &deadline) {
  const Header header{kMagic, static_cast<std::uint32_t>(frame.type), frame.status,
                      static_cast<std::uint32_t>(frame.payload.size()), frame.sequence};
  std::string bytes(reinterpret_cast<const char *>(&header), sizeof header);
  bytes += frame.payload;
  socket.send_all(bytes.data(), bytes.size(), deadline);
}

Frame receive_frame(const Socket &socket, const Deadline &deadline) {
  Header header{};
  socket.receive_all(&header, sizeof header, deadline);
  if (header.magic != kMagic || header.bytes > kMaxPayload) {
    throw hccl::Refused(26, HCCL_E_TCP_TRANSFER, "a control message that is none");
  }
  Frame frame{static_cast<Message>(header.type), header.status, std::string(header.bytes, '\0'), header.sequence};
  socket.receive_all(&frame.payload[0], header.bytes, deadline);
  return frame;
}

Socket listen_tcp(const EngineName &name) {
  sockaddr_storage address;
  const socklen_t size = fill(name, &address);
  Socket socket(::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  ::setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(socket.fd(), reinterpret_cast<sockaddr *>(&address), size) != 0 || ::listen(socket.fd(), 512) != 0) {
    socket.close();
  }
  return socket;
}

Socket connect_tcp(const EngineName &name, const Deadline &deadline) {
  sockaddr_storage address;
  const socklen_t size = fill(name, &address);
  Socket socket(::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int on = 1;
  ::setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (::connect(socket.fd(), reinterpret_cast<sockaddr *>(&address), size) == 0) return socket;
  if (errno != EINPROGRESS) return Socket();
  while (!deadline.passed()) {
    pollfd item{socket.fd(), POLLOUT, 0};
    if (poll(&item, 1, deadline.left_ms(50)) <= 0) continue;
    int error = 0;
    socklen_t length = sizeof error;
    ::getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length);
    return error == 0 ? std::move(socket) : Socket();
  }
  return Socket();
}

}  // namespace cann_sim::hixl_sim
