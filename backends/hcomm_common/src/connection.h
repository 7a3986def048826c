// One communicator of two ranks: made, prepared together with the peer, and taken down.
//
// Its steps are vendor calls that may block or hang, so they run on threads that can be given up (VendorRunner); such a
// thread keeps the connection, and with it the regions it is bound to, until the vendor lets go.
#ifndef KVLINK_HCOMM_CONNECTION_H
#define KVLINK_HCOMM_CONNECTION_H

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ascend/memory.h"
#include "topology.h"
#include "vendor.h"

namespace kvlink::hcomm {

class Connection {
 public:
  // `owner` is kept alive as long as this lives: the regions belong to its memory.
  Connection(std::shared_ptr<void> owner, std::shared_ptr<const Vendor> vendor, ascend::Bindings bindings);
  Connection(const Connection &) = delete;
  Connection &operator=(const Connection &) = delete;

  // The device's context is current in all of these; each blocks.
  // Makes the communicator; tries again while the vendor answers "unavailable", which several processes at once cause.
  Failure init(const Topology &topology, const std::string &name, const host::Deadline &deadline);
  // Binds the regions and meets the peer. Afterwards both can move bytes.
  Failure prepare(const host::Deadline &deadline);
  // Waits until no stream uses it any more, unbinds, destroys. Again is harmless. What the vendor refuses stays bound.
  Failure take_down(const host::Deadline &deadline);

  bool in_step();  // a call of another thread has not come back

  // The vendor has not let go: the memory is not given back until it does.
  void quarantine(ascend::Quarantine &quarantine);

  // A stream with transfers of this connection; take_down waits for its end.
  void lane_in() { lanes_.fetch_add(1); }
  void lane_out();

  ascend::HcclComm comm() const { return comm_; }
  uint32_t peer_rank() const { return peer_rank_; }
  uint32_t retries() const { return retries_.load(); }

 private:
  Failure bind_all(const host::Deadline &deadline);
  Failure register_all();
  Failure exchange(int seconds);
  Failure unbind_all();
  int seconds_for(const host::Deadline &deadline) const;

  const std::shared_ptr<void> owner_;
  const std::shared_ptr<const Vendor> vendor_;
  ascend::Bindings bindings_;
  std::mutex mutex_;  // one step at a time
  ascend::HcclComm comm_ = nullptr;
  uint32_t peer_rank_ = 0;
  uint32_t peer_regions_ = 0;
  std::vector<ascend::Region *> distinct_;           // of bindings_: regions over the same memory share a handle
  size_t bound_ = 0;                                 // of distinct_, in order
  size_t enabled_ = 0;                               // of remote_, in order
  std::vector<ascend::HcclMemDesc> local_, remote_;  // per-communicator flavour
  bool down_ = false;
  std::atomic<uint32_t> retries_{0};

  std::mutex lanes_mutex_;  // guards the rest
  std::condition_variable lanes_changed_;
  bool released_ = false;                     // nothing of the memory is bound any more
  ascend::Quarantine *quarantine_ = nullptr;  // holds quarantined_; the owner's
  std::vector<uint64_t> quarantined_;
  std::atomic<uint32_t> lanes_{0};
};

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_CONNECTION_H
