// The network of the simulated NICs: Unix sockets in the abstract namespace, named by (network, device address, port).
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "call.h"
#include "memory.h"

namespace cann_sim {
namespace {

bool fill_address(const std::string &ip, int port, sockaddr_un *address, socklen_t *length) {
  const std::string name =
      "cann_sim/" + std::to_string(::geteuid()) + "/" + settings().net + "/" + ip + ":" + std::to_string(port);
  std::memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(address->sun_path)) {
    errno = ENAMETOOLONG;
    return false;
  }
  std::memcpy(address->sun_path + 1, name.data(), name.size());  // a first byte of 0: abstract, gone with its process
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return true;
}

int fail_closing(int descriptor) {
  const int error = errno;
  ::close(descriptor);
  errno = error;
  return -1;
}

}  // namespace

int nic_listen(const std::string &ip, int port) {
  const Fault fault = fault_at("nic_listen");
  const std::vector<int> &taken = settings().ports_taken;
  if (fault.kind == Fault::kFail || std::find(taken.begin(), taken.end(), port) != taken.end()) {
    errno = EADDRINUSE;
    return -1;
  }
  sockaddr_un address;
  socklen_t length = 0;
  if (!fill_address(ip, port, &address, &length)) return -1;
  const int descriptor = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (descriptor < 0) return -1;
  if (::bind(descriptor, reinterpret_cast<sockaddr *>(&address), length) != 0 || ::listen(descriptor, 512) != 0) {
    return fail_closing(descriptor);
  }
  log_event("nic_listen", "\"ip\":" + json_quote(ip) + ",\"port\":" + std::to_string(port));
  return descriptor;
}

int nic_connect(const std::string &ip, int port) {
  sockaddr_un address;
  socklen_t length = 0;
  if (!fill_address(ip, port, &address, &length)) return -1;
  const int descriptor = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (descriptor < 0) return -1;
  if (::connect(descriptor, reinterpret_cast<sockaddr *>(&address), length) != 0) return fail_closing(descriptor);
  return descriptor;
}

}  // namespace cann_sim
