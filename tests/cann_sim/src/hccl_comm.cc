#include "hccl_comm.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "hccl_config.h"
#include "hccl_env.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr std::size_t kOldLimit = 256;
// Initialisation is slow on hardware (seconds); here just long enough that two at once are seen to overlap.
constexpr auto kInitTime = std::chrono::milliseconds(2);

struct Comms {
  std::mutex mutex;
  std::map<HcclComm, CommPtr> all;
  std::atomic<int> initialising{0};
};
Comms &comms() {
  static auto &instance = *new Comms;
  return instance;
}

// What is seen on hosts where several processes initialise at once: all but one fail, and a later try succeeds.
class HostShare {
 public:
  HostShare() {
    if (!settings().init_contention) return;
    held_ = Socket(nic_listen("communicator-init", 1));
    if (!held_.open()) throw Refused(13, HCCL_E_UNAVAIL, "EI0007: another process of this host is initialising");
  }

 private:
  Socket held_;
};

int need_device(const char *what) {
  const int device = current_device();
  if (device < 0) throw Refused(4, HCCL_E_RUNTIME, std::string(what) + ": this thread has no device (rt 107002)");
  return device;
}

void check_name_free(const std::string &name, int device) {
  const std::lock_guard<std::mutex> lock(comms().mutex);
  for (const auto &[handle, other] : comms().all) {
    if (other->name == name && other->device == device) {
      throw Refused(12, HCCL_E_PARA, "EI0003: the communicator name " + name + " is in use on this device");
    }
  }
}

}  // namespace

Family family() {
  switch (settings().soc) {
    case Soc::kA2:
      return Family::a2;
    case Soc::kA3:
      return Family::a3;
    case Soc::k950:
      break;
  }
  return Family::other;
}

OneInitAtATime::OneInitAtATime() {
  if (comms().initialising.fetch_add(1) > 0) {
    violation(13, "two communicator initialisations at once in one process");
  }
  count_live("hccl_inits", 1);
}
OneInitAtATime::~OneInitAtATime() {
  comms().initialising.fetch_sub(1);
  count_live("hccl_inits", -1);
}

Link Comm::link_to(std::uint32_t peer) const { return table.link(rank, peer, family(), roce_forced); }

Hello Comm::hello(std::uint32_t peer, std::uint32_t service) const {
  Hello hello;
  std::memcpy(hello.comm_name, name.data(), std::min(name.size(), sizeof hello.comm_name));
  hello.table_hash = table.hash;
  hello.server_rank = std::min(rank, peer);
  hello.client_rank = std::max(rank, peer);
  hello.link = static_cast<std::uint32_t>(link_to(peer));
  hello.tls = settings().tls && link_to(peer) == Link::roce ? 1 : 0;
  hello.service = service;
  return hello;
}

HcclComm create_comm(const char *rank_table, std::uint32_t rank, const HcclCommConfig *config) {
  const int device = need_device("HcclCommInitClusterInfoMemConfig");
  if (rank_table == nullptr || config == nullptr) throw Refused(12, HCCL_E_PTR, "EI0003: a null argument");
  const Environment &env = environment();
  const HostShare share;
  auto comm = std::make_shared<Comm>();
  comm->name = read_config(config);
  check_name_free(comm->name, device);
  comm->roce_forced = env.roce;
  comm->table = parse_rank_table(rank_table, family(), env.roce);
  comm->rank = rank;
  comm->device = device;
  if (rank >= comm->ranks()) {
    throw Refused(12, HCCL_E_PARA, "EI0003: rank " + std::to_string(rank) + " of " + std::to_string(comm->ranks()));
  }
  if (comm->table.ranks[rank].device_id != physical_id(device)) {
    throw Refused(12, HCCL_E_UNAVAIL,
                  "EI0014: the rank table's device_id " + std::to_string(comm->table.ranks[rank].device_id) +
                      " is not this device, " + std::to_string(physical_id(device)));
  }
  std::this_thread::sleep_for(kInitTime);
  comm->handle = new_handle();
  const std::lock_guard<std::mutex> lock(comms().mutex);
  comms().all.emplace(comm->handle, comm);
  count_live("hccl_comm", 1);
  return comm->handle;
}

CommPtr find_comm(HcclComm handle) {
  if (handle == nullptr) throw Refused(20, HCCL_E_PTR, "EI0003: the communicator is null");
  const std::lock_guard<std::mutex> lock(comms().mutex);
  const auto found = comms().all.find(handle);
  if (found != comms().all.end()) return found->second;
  violation(33, "a communicator handle that is not live (destroyed: %s)", was_handle(handle) ? "yes" : "never created");
  throw Refused(33, HCCL_E_PARA, "the communicator is not live");
}

void release_links(Comm &comm) {
  for (const auto &[peer, connection] : comm.connections) {
    connection->broken = true;
    connection->socket.shut_down();
    release_hbm(comm.device, connection->hbm_charged);
    connection->hbm_charged = 0;
  }
  comm.connections.clear();
  for (const auto &[region, link] : comm.on_nic) take_off_nic(region, link);
  comm.on_nic.clear();
  comm.own_regions.clear();
  comm.local = std::make_shared<LocalRanges>();
}

void destroy_comm(HcclComm handle) {
  const int device = need_device("HcclCommDestroy");
  if (handle == nullptr) return;
  const CommPtr comm = find_comm(handle);
  if (comm->device != device) {
    throw Refused(19, HCCL_E_PARA,
                  "HcclCommDestroy: unknown group " + comm->name + " on device " + std::to_string(device));
  }
  if (comm->users > 0 || comm->in_flight > 0) {
    throw Refused(19, HCCL_E_AGAIN, "HcclCommDestroy: " + comm->name + " is in use");
  }
  {
    const std::lock_guard<std::mutex> lock(comm->mutex);
    if (!comm->bound.empty()) {
      throw Refused(19, HCCL_E_PARA,
                    "HcclCommDestroy: " + std::to_string(comm->bound.size()) + " memories are still bound");
    }
    release_links(*comm);
  }
  const std::lock_guard<std::mutex> lock(comms().mutex);
  comms().all.erase(handle);
  count_live("hccl_comm", -1);
}

void bind(HcclComm handle, void *memory) {
  const Comm::Use comm(find_comm(handle));
  const RegionPtr region = find_region(memory);
  const std::lock_guard<std::mutex> lock(comm->mutex);
  if (std::find(comm->bound.begin(), comm->bound.end(), region) != comm->bound.end()) {
    throw Refused(15, HCCL_E_PARA, "HcclCommBindMem: the memory is bound to this communicator already");
  }
  if (old_tables() && comm->bound.size() >= kOldLimit) {
    throw Refused(15, HCCL_E_UNAVAIL, "HcclCommBindMem: 256 memories are bound already");
  }
  bind_region(region);
  comm->bound.push_back(region);  // after Prepare: accepted, and invisible to the peer
}

void unbind(HcclComm handle, void *memory) {
  const Comm::Use comm(find_comm(handle));
  const RegionPtr region = find_region(memory);
  const std::lock_guard<std::mutex> lock(comm->mutex);
  const auto found = std::find(comm->bound.begin(), comm->bound.end(), region);
  if (found == comm->bound.end()) {
    throw Refused(15, HCCL_E_PARA, "HcclCommUnbindMem: the memory is not bound to this communicator");
  }
  comm->bound.erase(found);
  unbind_region(region);
}

}  // namespace cann_sim::hccl
