// Connections between two ranks: real sockets on the simulated NICs, and how two processes find each other (rule 16).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hccl_ranktable.h"
#include "hccl_socket.h"
#include "memory.h"

namespace cann_sim::hccl {

// What the two sides must have in common before they become a connection. Where they differ, neither ever answers.
struct Hello {
  std::uint64_t magic = kMagic;
  char comm_name[128] = {};
  std::uint64_t table_hash = 0;
  std::uint32_t client_rank = 0;
  std::uint32_t server_rank = 0;
  std::uint32_t link = 0;
  std::uint32_t tls = 0;
  std::uint32_t service = 0;  // 0: HcclCommPrepare, 1: HcclExchangeMemDesc

  static constexpr std::uint64_t kMagic = 0x6c6363686d6973ULL;
  bool operator==(const Hello &other) const;
};

struct RemoteRegion {
  std::uint64_t start = 0;  // as the peer knows it
  std::uint64_t end = 0;
  int type = 0;
  Exported memory;
};

using RemoteRegions = std::vector<RemoteRegion>;  // sorted by start

// One peer of a communicator.
struct Connection {
  Socket socket;
  Link link = Link::roce;
  int device = -1;  // local user device
  // Replaced as a whole under the communicator's lock: operations in flight keep the list they were checked against.
  std::shared_ptr<const RemoteRegions> remote = std::make_shared<RemoteRegions>();
  std::uint64_t hbm_charged = 0;
  std::atomic<bool> broken{false};

  // The peer's process or its half of the link has gone.
  bool peer_lost() const { return broken || socket.peer_closed(); }
};

// The lower rank waits, the higher one calls. Throws Refused: 7 when the port is taken, 9 at the deadline.
Socket await_peer(const Hello &hello, int device, const std::string &address, const std::vector<int> &ports,
                  const Deadline &deadline);
Socket call_peer(const Hello &hello, const std::string &address, const std::vector<int> &ports,
                 const Deadline &deadline);

// The address of a rank's NIC: the device's own over RoCE, a virtual one over HCCS.
std::string nic_address(const Rank &rank, Link link);
// The ports on which the rank may listen, in the order it tries them.
std::vector<int> nic_ports(const Rank &rank);

// Connections are broken, and listeners closed, when their device's last memory is deregistered (rule 19).
void remember(const std::shared_ptr<Connection> &connection);
void close_connections(int device);

}  // namespace cann_sim::hccl
