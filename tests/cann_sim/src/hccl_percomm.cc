#include "hccl_percomm.h"

#include <algorithm>
#include <cstring>

#include "hccl_comm.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr std::size_t kMaxPerPeer = 256;
constexpr std::uint64_t kMaxDevice = 64ULL << 30;
constexpr std::uint64_t kMaxHost = 1ULL << 40;

// What the library writes into the 512 opaque bytes.
struct Description {
  std::uint32_t owner = 0;  // rank whose memory it is
  std::uint32_t reader = 0;
  std::uint64_t magic = kMagic;
  std::uint64_t id = 0;
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
  std::int32_t type = 0;
  std::uint32_t reserved = 0;
  Exported memory;

  static constexpr std::uint64_t kMagic = 0x637365646d656dULL;
};
static_assert(sizeof(Description) <= sizeof(HcclMemDesc));

Description read(const HcclMemDesc *desc) {
  if (desc == nullptr) throw Refused(20, HCCL_E_PTR, "EI0003: the description is null");
  Description out;
  std::memcpy(static_cast<void *>(&out), desc->desc, sizeof out);
  if (out.magic != Description::kMagic) throw Refused(20, HCCL_E_PARA, "EI0003: not a memory description");
  return out;
}

void check_rank(const Comm &comm, std::uint32_t peer) {
  if (peer >= comm.ranks()) throw Refused(20, HCCL_E_PARA, "EI0003: remote rank " + std::to_string(peer));
}

void refresh_local(Comm &comm) {
  std::vector<RegionPtr> regions;
  for (const auto &[id, own] : comm.own_regions) {
    // One range may be registered for several peers.
    const bool known = std::any_of(regions.begin(), regions.end(), [&own = own](const RegionPtr &other) {
      return other->start == own.first->start && other->bytes == own.first->bytes;
    });
    if (!known) regions.push_back(own.first);
  }
  comm.local = std::make_shared<const LocalRanges>(ranges_of(regions));
}

std::shared_ptr<Connection> connected(Comm &comm, std::uint32_t peer) {
  const std::lock_guard<std::mutex> lock(comm.mutex);
  const auto found = comm.connections.find(peer);
  return found == comm.connections.end() ? nullptr : found->second;
}

std::shared_ptr<Connection> connect(Comm &comm, std::uint32_t peer, const Deadline &deadline) {
  if (auto known = connected(comm, peer)) return known;
  std::shared_ptr<Connection> made = open_connection(comm, peer, 1, deadline);
  charge_link(*made);
  remember(made);
  const std::lock_guard<std::mutex> lock(comm.mutex);
  comm.connections[peer] = made;
  return made;
}

void receive_into(const Connection &connection, HcclMemDescs *remote, std::uint32_t *count, const Deadline &deadline) {
  std::uint32_t announced = 0;
  connection.socket.receive_all(&announced, sizeof announced, deadline);
  if (announced > kMaxPerPeer) throw Refused(18, HCCL_E_UNAVAIL, "the peer describes more than 256 regions");
  if (announced > remote->arrayLength) {
    violation(33, "HcclExchangeMemDesc writes %u descriptions into an array of %u", announced, remote->arrayLength);
    throw Refused(33, HCCL_E_PARA, "the array for the peer's descriptions is too short");
  }
  connection.socket.receive_all(remote->array, announced * sizeof(HcclMemDesc), deadline);
  *count = announced;
}

}  // namespace

void register_own(HcclComm handle, std::uint32_t peer, int type, void *address, std::uint64_t size, HcclMemDesc *desc) {
  const Comm::Use comm(find_comm(handle));
  if (address == nullptr || desc == nullptr) throw Refused(11, HCCL_E_PTR, "EI0003: a null argument");
  check_rank(*comm.shared(), peer);
  if (peer == comm->rank) return;
  if (size == 0 || (type != HCCL_MEM_TYPE_DEVICE && type != HCCL_MEM_TYPE_HOST) ||
      size > (type == HCCL_MEM_TYPE_DEVICE ? kMaxDevice : kMaxHost)) {
    throw Refused(11, HCCL_E_PARA,
                  "EI0003: HcclRegisterMem: size " + std::to_string(size) + ", type " + std::to_string(type));
  }
  if (settings().soc == Soc::k950 && type != HCCL_MEM_TYPE_DEVICE) {
    throw Refused(18, HCCL_E_NOT_SUPPORT, "Ascend950 registers device memory only");
  }
  const std::lock_guard<std::mutex> lock(comm->mutex);
  const auto mine = std::count_if(comm->own_regions.begin(), comm->own_regions.end(),
                                  [peer](const auto &entry) { return entry.second.second == peer; });
  if (static_cast<std::size_t>(mine) >= kMaxPerPeer)
    throw Refused(11, HCCL_E_UNAVAIL, "256 regions for that rank already");
  auto region = std::make_shared<Region>();
  region->type = type;
  region->start = reinterpret_cast<std::uint64_t>(address);
  region->bytes = size;
  region->table = comm->device;
  const Link link = comm->link_to(peer);
  put_on_nic(region, link, comm->device);  // the hardware looks at it here and now
  comm->on_nic.emplace_back(region, link);
  Description out;
  out.owner = comm->rank;
  out.reader = peer;
  out.id = comm->next_region++;
  out.start = region->start;
  out.bytes = size;
  out.type = type;
  export_range(address, size, &out.memory);
  comm->own_regions[out.id] = {region, peer};
  refresh_local(*comm.shared());
  std::memset(desc->desc, 0, sizeof desc->desc);
  std::memcpy(desc->desc, &out, sizeof out);
}

void deregister_own(HcclComm handle, const HcclMemDesc *desc) {
  const Comm::Use comm(find_comm(handle));
  const Description mine = read(desc);
  const std::lock_guard<std::mutex> lock(comm->mutex);
  const auto found = comm->own_regions.find(mine.id);
  if (mine.owner != comm->rank || found == comm->own_regions.end()) {
    throw Refused(19, HCCL_E_NOT_FOUND, "HcclDeregisterMem: no such registration");
  }
  const RegionPtr region = found->second.first;
  comm->own_regions.erase(found);
  const auto on_nic = std::find_if(comm->on_nic.begin(), comm->on_nic.end(),
                                   [&region](const auto &entry) { return entry.first == region; });
  take_off_nic(region, on_nic->second);
  comm->on_nic.erase(on_nic);
  refresh_local(*comm.shared());
}

void exchange_own(HcclComm handle, std::uint32_t peer, const HcclMemDescs *local, int timeout_s, HcclMemDescs *remote,
                  std::uint32_t *count) {
  const Comm::Use comm(find_comm(handle));
  if (local == nullptr || remote == nullptr || count == nullptr ||
      (local->array == nullptr && local->arrayLength > 0) || remote->array == nullptr) {
    throw Refused(16, HCCL_E_PTR, "EI0003: a null argument");
  }
  check_rank(*comm.shared(), peer);
  if (timeout_s < -1 || local->arrayLength > kMaxPerPeer) throw Refused(16, HCCL_E_PARA, "EI0003: HcclExchangeMemDesc");
  if (peer == comm->rank) return;
  const auto connection = connect(*comm.shared(), peer, phase_deadline(timeout_s));
  std::vector<HcclMemDesc> sent;
  for (std::uint32_t i = 0; i < local->arrayLength; ++i) {
    // Host memory is not exchanged over HCCS (rule 18).
    if (connection->link == Link::roce || read(&local->array[i]).type == HCCL_MEM_TYPE_DEVICE)
      sent.push_back(local->array[i]);
  }
  const Deadline deadline = phase_deadline(timeout_s);
  const auto number = static_cast<std::uint32_t>(sent.size());
  connection->socket.send_all(&number, sizeof number, deadline);
  connection->socket.send_all(sent.data(), sent.size() * sizeof(HcclMemDesc), deadline);
  receive_into(*connection, remote, count, deadline);
}

void enable_access(HcclComm handle, const HcclMemDesc *desc, HcclMem *memory) {
  const Comm::Use comm(find_comm(handle));
  if (memory == nullptr) throw Refused(20, HCCL_E_PTR, "EI0003: a null argument");
  const Description theirs = read(desc);
  check_rank(*comm.shared(), theirs.owner);
  const auto connection = connected(*comm.shared(), theirs.owner);
  if (!connection || theirs.reader != comm->rank) {
    throw Refused(20, HCCL_E_NOT_FOUND, "HcclEnableMemAccess: not a description for this rank, or not exchanged");
  }
  if (connection->link == Link::hccs) {
    // Process information goes both ways: the peer has to be in the same call.
    const Deadline deadline = phase_deadline(0);
    char hello = 1;
    connection->socket.send_all(&hello, 1, deadline);
    connection->socket.receive_all(&hello, 1, deadline);
  }
  const std::lock_guard<std::mutex> lock(comm->mutex);
  RemoteRegions all = *connection->remote;
  const RemoteRegion added{theirs.start, theirs.start + theirs.bytes, theirs.type, theirs.memory};
  all.insert(std::upper_bound(all.begin(), all.end(), added,
                              [](const RemoteRegion &a, const RemoteRegion &b) { return a.start < b.start; }),
             added);
  connection->remote = std::make_shared<const RemoteRegions>(std::move(all));
  *memory = {static_cast<HcclMemType>(theirs.type), reinterpret_cast<void *>(theirs.start), theirs.bytes};
}

void disable_access(HcclComm handle, const HcclMemDesc *desc) {
  const Comm::Use comm(find_comm(handle));
  const Description theirs = read(desc);
  const auto connection = connected(*comm.shared(), theirs.owner);
  if (!connection) throw Refused(20, HCCL_E_NOT_FOUND, "HcclDisableMemAccess: no connection to that rank");
  const std::lock_guard<std::mutex> lock(comm->mutex);
  RemoteRegions all = *connection->remote;
  const auto found = std::find_if(all.begin(), all.end(), [&theirs](const RemoteRegion &one) {
    return one.start == theirs.start && one.end == theirs.start + theirs.bytes;
  });
  if (found == all.end()) throw Refused(20, HCCL_E_NOT_FOUND, "HcclDisableMemAccess: that memory is not enabled");
  all.erase(found);
  connection->remote = std::make_shared<const RemoteRegions>(std::move(all));
}

}  // namespace cann_sim::hccl
