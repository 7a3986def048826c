#include "hccl_listener.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

struct Listeners {
  std::mutex mutex;
  std::vector<std::shared_ptr<Listener>> all;
};
Listeners &listeners() {
  static auto &instance = *new Listeners;
  return instance;
}

}  // namespace

Listener::Listener(int device_id, std::string where, int port_number, int fd)
    : device(device_id), address(std::move(where)), port(port_number), socket_(fd) {
  if (pipe2(wake_, O_CLOEXEC | O_NONBLOCK) != 0) throw Refused(16, HCCL_E_SYSCALL, "pipe2 failed");
  count_live("hccl_listener", 1);
  thread_ = std::thread([this] { run(); });
}

Listener::~Listener() {
  const char stop = 1;
  if (::write(wake_[1], &stop, 1) == 1) thread_.join();
  ::close(wake_[0]);
  ::close(wake_[1]);
  count_live("hccl_listener", -1);
}

void Listener::run() {
  while (true) {
    std::vector<pollfd> items = {{wake_[0], POLLIN, 0}, {socket_.fd(), POLLIN, 0}};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const Caller &caller : callers_) {
        const short events = caller.received < sizeof(Hello) ? POLLIN | POLLRDHUP : POLLRDHUP;
        items.push_back({caller.socket.fd(), events, 0});
      }
    }
    if (poll(items.data(), items.size(), -1) < 0 && errno != EINTR) return;
    if (items[0].revents != 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto caller = callers_.begin(); caller != callers_.end();) {
        const int fd = caller->socket.fd();
        const auto item =
            std::find_if(items.begin() + 2, items.end(), [fd](const pollfd &one) { return one.fd == fd; });
        const bool ready = item != items.end() && item->revents != 0;
        caller = ready && !read_hello(*caller) ? callers_.erase(caller) : std::next(caller);
      }
    }
    if (items[1].revents != 0) accept_one();
    arrived_.notify_all();
  }
}

void Listener::accept_one() {
  const int fd = ::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC);
  if (fd < 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  callers_.emplace_back();
  callers_.back().socket = Socket(fd);
}

bool Listener::read_hello(Caller &caller) {
  char *into = reinterpret_cast<char *>(&caller.hello) + caller.received;
  const std::size_t wanted = sizeof(Hello) - caller.received;
  if (wanted == 0) return false;  // only the end of the connection wakes us then
  const ssize_t got = ::recv(caller.socket.fd(), into, wanted, MSG_DONTWAIT);
  if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return false;
  if (got > 0) caller.received += static_cast<std::size_t>(got);
  return caller.received < sizeof(Hello) || caller.hello.magic == Hello::kMagic;
}

int Listener::take(const Hello &hello, int timeout_ms) {
  std::unique_lock<std::mutex> lock(mutex_);
  int fd = -1;
  arrived_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] {
    for (auto caller = callers_.begin(); caller != callers_.end(); ++caller) {
      if (caller->received < sizeof(Hello) || !(caller->hello == hello)) continue;
      if (caller->socket.peer_closed()) continue;
      fd = caller->socket.release();
      callers_.erase(caller);
      return true;
    }
    return false;
  });
  return fd;
}

std::shared_ptr<Listener> listen_on(int device, const std::string &address, const std::vector<int> &ports) {
  const std::lock_guard<std::mutex> lock(listeners().mutex);
  for (const auto &listener : listeners().all) {
    const bool wanted = std::find(ports.begin(), ports.end(), listener->port) != ports.end();
    if (listener->address == address && wanted) return listener;
  }
  for (const int port : ports) {
    const int fd = nic_listen(address, port);
    if (fd < 0) continue;
    listeners().all.push_back(std::make_shared<Listener>(device, address, port, fd));
    return listeners().all.back();
  }
  throw Refused(16, HCCL_E_UNAVAIL,
                "EI0020: the NPU NIC's listen address " + address + ":" + std::to_string(ports.front()) +
                    " is in use (HcclSocket::Listen)");
}

void close_listeners(int device) {
  std::vector<std::shared_ptr<Listener>> closing;
  const std::lock_guard<std::mutex> lock(listeners().mutex);
  auto &all = listeners().all;
  for (auto listener = all.begin(); listener != all.end();) {
    const bool ours = (*listener)->device == device;
    if (ours) closing.push_back(*listener);
    listener = ours ? all.erase(listener) : listener + 1;
  }
}

}  // namespace cann_sim::hccl
