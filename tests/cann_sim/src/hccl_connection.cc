#include "hccl_connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "hccl_env.h"
#include "hccl_listener.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr int kDefaultPort = 16666;
constexpr int kSliceMs = 20;  // how often a waiting call looks again

struct Connections {
  std::mutex mutex;
  std::vector<std::weak_ptr<Connection>> all;
};
Connections &connections() {
  static auto &instance = *new Connections;
  return instance;
}

}  // namespace

bool Hello::operator==(const Hello &other) const {
  return magic == other.magic && std::memcmp(comm_name, other.comm_name, sizeof comm_name) == 0 &&
         table_hash == other.table_hash && client_rank == other.client_rank && server_rank == other.server_rank &&
         link == other.link && tls == other.tls && service == other.service;
}

std::string nic_address(const Rank &rank, Link link) {
  if (link == Link::roce) return rank.device_ip;
  // Server ids are free text of up to 64 characters; an address has to stay short.
  const std::uint64_t server = fnv1a(rank.server_id.data(), rank.server_id.size());
  return "vnic-" + std::to_string(server) + "-" + std::to_string(rank.device_id);
}

std::vector<int> nic_ports(const Rank &rank) {
  if (rank.device_port != 0) return {rank.device_port};
  std::vector<int> ports;
  for (auto [low, high] : environment().port_ranges) {
    if (low == 0) low = 61000, high = 61063;  // "auto"
    for (int port = low; port <= high; ++port) ports.push_back(port);
  }
  if (ports.empty()) ports.push_back(kDefaultPort);
  return ports;
}

Socket await_peer(const Hello &hello, int device, const std::string &address, const std::vector<int> &ports,
                  const Deadline &deadline) {
  const std::shared_ptr<Listener> listener = listen_on(device, address, ports);
  while (!deadline.passed()) {
    const int fd = listener->take(hello, deadline.left_ms(kSliceMs));
    if (fd < 0) continue;
    Socket socket(fd);
    const char yes = 1;
    socket.send_all(&yes, 1, deadline);
    return socket;
  }
  refuse_late();
}

Socket call_peer(const Hello &hello, const std::string &address, const std::vector<int> &ports,
                 const Deadline &deadline) {
  // One socket a port that answers; the right process is the one that says yes.
  std::vector<Socket> sockets(ports.size());
  while (!deadline.passed()) {
    std::vector<pollfd> items(ports.size());
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if (!sockets[i].open()) {
        sockets[i] = Socket(nic_connect(address, ports[i]));
        if (sockets[i].open()) sockets[i].send_all(&hello, sizeof hello, deadline);
      }
      items[i] = {sockets[i].fd(), POLLIN, 0};
    }
    if (poll(items.data(), items.size(), deadline.left_ms(kSliceMs)) <= 0) continue;
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if (items[i].revents == 0) continue;
      char answer = 0;
      if (::recv(sockets[i].fd(), &answer, 1, MSG_DONTWAIT) == 1 && answer == 1) return std::move(sockets[i]);
      sockets[i].close();
    }
  }
  refuse_late();
}

void remember(const std::shared_ptr<Connection> &connection) {
  const std::lock_guard<std::mutex> lock(connections().mutex);
  auto &all = connections().all;
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto &entry) { return entry.expired(); }), all.end());
  all.push_back(connection);
}

void close_connections(int device) {
  {
    const std::lock_guard<std::mutex> lock(connections().mutex);
    for (const auto &entry : connections().all) {
      const auto connection = entry.lock();
      if (!connection || connection->device != device || connection->broken.exchange(true)) continue;
      connection->socket.shut_down();
      log_event("link_broken_by_last_deregistration");
    }
  }
  close_listeners(device);
}

}  // namespace cann_sim::hccl
