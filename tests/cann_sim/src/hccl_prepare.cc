// HcclCommPrepare: the collective step in which ranks meet, memory reaches the NICs and descriptors are exchanged
// (rules 16, 17, 18).
#include <algorithm>
#include <optional>

#include "hccl_comm.h"
#include "hccl_env.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr std::uint64_t kLinkHbm = 2ULL << 20;
constexpr std::uint32_t kOldLimit = 256;
constexpr std::uint32_t kMaxRegions = 1 << 20;

struct Described {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
  std::uint32_t type = 0;
  std::uint32_t reserved = 0;
  Exported memory;
};

using Connections = std::map<std::uint32_t, std::shared_ptr<Connection>>;

void check_reachable(const Comm &comm, std::uint32_t peer, const Deadline &deadline) {
  if (comm.link_to(peer) != Link::hccs) return;
  if (family() == Family::a2 && !settings().hccs_wired) {
    throw Refused(16, HCCL_E_NOT_SUPPORT,
                  "EI0010: there is no HCCS link between the devices of ranks " + std::to_string(comm.rank) + " and " +
                      std::to_string(peer));
  }
  const bool known =
      !comm.table.ranks[comm.rank].super_device_id.empty() && !comm.table.ranks[peer].super_device_id.empty();
  if (family() != Family::a3 || known) return;
  // Without the super pod's own ids the sockets never find each other, and nothing says why (hixl issue 105).
  Hello nobody = comm.hello(peer, 0);
  nobody.table_hash = ~nobody.table_hash;
  call_peer(nobody, "super-device-unknown", {1}, deadline);
}

void register_memory(Comm &comm, const std::vector<RegionPtr> &regions, const Connections &connections) {
  bool used[2] = {};
  for (const auto &[peer, connection] : connections) {
    charge_link(*connection);
    used[static_cast<int>(connection->link)] = true;
  }
  for (const Link link : {Link::hccs, Link::roce}) {
    if (!used[static_cast<int>(link)]) continue;
    for (const RegionPtr &region : regions) {
      put_on_nic(region, link, comm.device);
      comm.on_nic.emplace_back(region, link);
    }
  }
}

std::vector<Described> describe_for(const std::vector<RegionPtr> &regions, Link link) {
  std::vector<Described> list;
  for (const RegionPtr &region : regions) {
    if (link == Link::hccs && region->type != HCCL_MEM_TYPE_DEVICE) continue;  // rule 18
    Described item;
    item.start = region->start;
    item.bytes = region->bytes;
    item.type = static_cast<std::uint32_t>(region->type);
    if (!export_range(reinterpret_cast<const void *>(region->start), region->bytes, &item.memory)) {
      throw Refused(17, HCCL_E_RUNTIME, "the memory went away during HcclCommPrepare");
    }
    list.push_back(item);
  }
  return list;
}

void send_regions(const Connection &connection, const std::vector<Described> &list, const Deadline &deadline) {
  const auto count = static_cast<std::uint32_t>(list.size());
  connection.socket.send_all(&count, sizeof count, deadline);
  connection.socket.send_all(list.data(), list.size() * sizeof(Described), deadline);
}

void receive_regions(Connection &connection, const Deadline &deadline) {
  std::uint32_t count = 0;
  connection.socket.receive_all(&count, sizeof count, deadline);
  if (count > kMaxRegions)
    throw Refused(16, HCCL_E_INTERNAL, "the peer announces " + std::to_string(count) + " regions");
  if (old_tables() && count > kOldLimit) throw Refused(18, HCCL_E_UNAVAIL, "the peer has more than 256 regions");
  std::vector<Described> list(count);
  connection.socket.receive_all(list.data(), count * sizeof(Described), deadline);
  RemoteRegions remote;
  for (const Described &item : list) {
    remote.push_back({item.start, item.start + item.bytes, static_cast<int>(item.type), item.memory});
  }
  std::sort(remote.begin(), remote.end(),
            [](const RemoteRegion &a, const RemoteRegion &b) { return a.start < b.start; });
  connection.remote = std::make_shared<const RemoteRegions>(std::move(remote));
}

void exchange(const std::vector<RegionPtr> &regions, const Connections &connections, const Deadline &deadline) {
  for (const auto &[peer, connection] : connections) {
    send_regions(*connection, describe_for(regions, connection->link), deadline);
  }
  for (const auto &[peer, connection] : connections) receive_regions(*connection, deadline);
}

void meet(const Connections &connections, const Deadline &deadline) {
  char ready = 1;
  for (const auto &[peer, connection] : connections) connection->socket.send_all(&ready, 1, deadline);
  for (const auto &[peer, connection] : connections) connection->socket.receive_all(&ready, 1, deadline);
}

}  // namespace

Deadline phase_deadline(int timeout_s) {
  if (timeout_s < 0) return Deadline(-1);
  const double default_ms = environment().connect_timeout_s * 1000.0 * settings().time_scale;
  return Deadline(timeout_s == 0 ? static_cast<std::int64_t>(default_ms) : timeout_s * std::int64_t{1000});
}

std::shared_ptr<Connection> open_connection(const Comm &comm, std::uint32_t peer, std::uint32_t service,
                                            const Deadline &deadline) {
  check_reachable(comm, peer, deadline);
  const Link link = comm.link_to(peer);
  const Hello hello = comm.hello(peer, service);
  const Rank &server = comm.table.ranks[hello.server_rank];
  auto connection = std::make_shared<Connection>();
  connection->link = link;
  connection->device = comm.device;
  connection->socket = comm.rank == hello.server_rank
                           ? await_peer(hello, comm.device, nic_address(server, link), nic_ports(server), deadline)
                           : call_peer(hello, nic_address(server, link), nic_ports(server), deadline);
  return connection;
}

void charge_link(Connection &connection) {
  if (!charge_hbm(connection.device, kLinkHbm)) {
    throw Refused(17, HCCL_E_TCP_TRANSFER, "EI0011: no 2 MiB of device memory left for one more link");
  }
  connection.hbm_charged = kLinkHbm;
}

LocalRanges ranges_of(const std::vector<RegionPtr> &regions) {
  LocalRanges ranges;
  for (const RegionPtr &region : regions) {
    ranges.push_back({region->start, region->start + region->bytes, region->type});
  }
  std::sort(ranges.begin(), ranges.end(), [](const LocalRange &a, const LocalRange &b) { return a.start < b.start; });
  return ranges;
}

void prepare(HcclComm handle, int timeout_s) {
  const Comm::Use comm(find_comm(handle));
  if (timeout_s < -1) throw Refused(16, HCCL_E_PARA, "EI0003: HcclCommPrepare: timeout " + std::to_string(timeout_s));
  std::vector<RegionPtr> regions;
  {
    const std::lock_guard<std::mutex> lock(comm->mutex);
    if (comm->state == Comm::State::ready) return;  // a second call does nothing
    if (comm->state != Comm::State::fresh) {
      throw Refused(16, HCCL_E_INTERNAL,
                    "HcclCommPrepare: an earlier call failed or is running; destroy the communicator");
    }
    if (current_device() != comm->device) {
      throw Refused(16, HCCL_E_RUNTIME, "HcclCommPrepare: the communicator's device is not current in this thread");
    }
    comm->state = Comm::State::preparing;
    regions = comm->bound;
  }
  Connections connections;
  try {
    const Deadline first = phase_deadline(timeout_s);  // each phase has the whole timeout anew
    for (std::uint32_t peer = 0; peer < comm->ranks(); ++peer) {
      if (peer != comm->rank) connections.emplace(peer, open_connection(*comm.shared(), peer, 0, first));
    }
    register_memory(*comm.shared(), regions, connections);
    exchange(regions, connections, phase_deadline(timeout_s));
    meet(connections, phase_deadline(timeout_s));
  } catch (...) {
    const std::lock_guard<std::mutex> lock(comm->mutex);
    comm->connections = std::move(connections);
    release_links(*comm.shared());
    comm->state = Comm::State::failed;
    throw;
  }
  for (const auto &[peer, connection] : connections) remember(connection);
  const std::lock_guard<std::mutex> lock(comm->mutex);
  comm->connections = std::move(connections);
  comm->local = std::make_shared<const LocalRanges>(ranges_of(regions));
  comm->state = Comm::State::ready;
}

}  // namespace cann_sim::hccl
