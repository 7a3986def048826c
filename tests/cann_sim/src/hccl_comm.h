// A communicator of the one-sided service: who is in it, the memory bound to it, and its connections.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hccl_abi.h"
#include "hccl_connection.h"
#include "hccl_memory.h"
#include "hccl_ranktable.h"

namespace cann_sim::hccl {

// A range of this process that a prepared communicator may use.
struct LocalRange {
  std::uint64_t start = 0;
  std::uint64_t end = 0;
  int type = 0;
};

using LocalRanges = std::vector<LocalRange>;  // sorted by start

class Comm {
 public:
  enum class State { fresh, preparing, ready, failed };

  // Enters and leaves a call; a communicator in a call can't be destroyed (20).
  class Use {
   public:
    explicit Use(std::shared_ptr<Comm> comm) : comm_(std::move(comm)) { ++comm_->users; }
    ~Use() { --comm_->users; }
    Use(const Use &) = delete;
    Use &operator=(const Use &) = delete;
    Comm *operator->() const { return comm_.get(); }
    const std::shared_ptr<Comm> &shared() const { return comm_; }

   private:
    std::shared_ptr<Comm> comm_;
  };

  std::uint32_t ranks() const { return static_cast<std::uint32_t>(table.ranks.size()); }
  Link link_to(std::uint32_t peer) const;
  Hello hello(std::uint32_t peer, std::uint32_t service) const;

  // Set at initialisation.
  HcclComm handle = nullptr;
  std::string name;
  std::uint32_t rank = 0;
  int device = -1;  // user id
  RankTable table;
  bool roce_forced = false;

  std::mutex mutex;  // what follows, up to the atomics
  State state = State::fresh;
  std::vector<RegionPtr> bound;
  std::vector<std::pair<RegionPtr, Link>> on_nic;
  std::shared_ptr<const LocalRanges> local = std::make_shared<LocalRanges>();  // replaced as a whole
  std::map<std::uint32_t, std::shared_ptr<Connection>> connections;
  std::map<std::uint64_t, std::pair<RegionPtr, std::uint32_t>> own_regions;  // HcclRegisterMem: id -> region, peer
  std::uint64_t next_region = 1;

  std::atomic<int> users{0};      // calls in progress
  std::atomic<int> in_flight{0};  // operations on streams
  std::atomic<int> async_error{HCCL_SUCCESS};
};
using CommPtr = std::shared_ptr<Comm>;

Family family();

// Rule 13: the library's own tables have no lock, so two initialisations at once are undefined there, also while one of
// them hangs.
class OneInitAtATime {
 public:
  OneInitAtATime();
  ~OneInitAtATime();
  OneInitAtATime(const OneInitAtATime &) = delete;
  OneInitAtATime &operator=(const OneInitAtATime &) = delete;
};

// HcclCommInitClusterInfoMemConfig, with a OneInitAtATime around it.
HcclComm create_comm(const char *rank_table, std::uint32_t rank, const HcclCommConfig *config);
void destroy_comm(HcclComm handle);
// Throws Refused(2) for null; a stale or foreign handle is a violation, then Refused(1).
CommPtr find_comm(HcclComm handle);

void bind(HcclComm handle, void *memory);
void unbind(HcclComm handle, void *memory);
void prepare(HcclComm handle, int timeout_s);
// What a failed or destroyed communicator held: connections, NIC entries, HBM. The caller holds comm.mutex.
void release_links(Comm &comm);

// Finds the peer and makes the connection, without any memory; throws Refused.
std::shared_ptr<Connection> open_connection(const Comm &comm, std::uint32_t peer, std::uint32_t service,
                                            const Deadline &deadline);
// 2 MiB of the device for each link; throws Refused.
void charge_link(Connection &connection);
// The end of one phase that has the vendor's timeout: 0 = HCCL_CONNECT_TIMEOUT, -1 = never.
Deadline phase_deadline(int timeout_s);
LocalRanges ranges_of(const std::vector<RegionPtr> &regions);

}  // namespace cann_sim::hccl
