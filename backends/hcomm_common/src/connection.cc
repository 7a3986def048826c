#include "connection.h"

#include <poll.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <random>

namespace kvlink::hcomm {
namespace {

using ascend::InitLock;
using ascend::Region;
using host::Deadline;

constexpr uint32_t kFirstRetryMs = 100;
constexpr uint32_t kLastRetryMs = 5000;
constexpr uint32_t kDestroyAgainMs = 50;
constexpr uint32_t kMostPerCommunicator = 256;  // HCCL exchanges no more of one communicator's regions

// Sleeps, unless the deadline or its interrupt comes first: false.
bool pause_ms(uint32_t milliseconds, const Deadline &deadline) {
  const int left = deadline.remaining_ms();
  if (left <= 0) return false;
  pollfd interrupt{deadline.interrupt_fd, POLLIN, 0};
  return ::poll(&interrupt, 1, std::min(left, static_cast<int>(milliseconds))) == 0;
}

uint32_t jitter(uint32_t milliseconds) {
  // Not std::random_device: GCC's, linked in, asks the host for a C library of 2022.
  static thread_local std::minstd_rand random([] {
    unsigned seed = 1;
    return getrandom(&seed, sizeof seed, GRND_NONBLOCK) == sizeof seed ? seed : static_cast<unsigned>(getpid());
  }());
  return milliseconds / 2 + static_cast<uint32_t>(random() % (milliseconds / 2 + 1));
}

}  // namespace

void Connection::lane_out() {
  const std::lock_guard<std::mutex> lock(lanes_mutex_);
  if (lanes_.fetch_sub(1) == 1) lanes_changed_.notify_all();
}

Connection::Connection(std::shared_ptr<void> owner, std::shared_ptr<const Vendor> vendor, ascend::Bindings bindings)
    : owner_(std::move(owner)), vendor_(std::move(vendor)), bindings_(std::move(bindings)) {
  for (const std::shared_ptr<Region> &region : bindings_.regions()) {
    const auto same = [&region](const Region *known) {
      return known->address == region->address && known->length == region->length && known->kind == region->kind;
    };
    if (std::none_of(distinct_.begin(), distinct_.end(), same)) distinct_.push_back(region.get());
  }
}

void Connection::quarantine(ascend::Quarantine &quarantine) {
  const std::lock_guard<std::mutex> lock(lanes_mutex_);
  if (released_) return;  // it let go meanwhile
  quarantine_ = &quarantine;
  for (const Region *region : distinct_) {
    quarantined_.push_back(
        quarantine.add(region->address, region->length, "a vendor call on a closed link has not returned"));
  }
}

bool Connection::in_step() {
  const std::unique_lock<std::mutex> step(mutex_, std::try_to_lock);
  return !step.owns_lock();
}

// The vendor spends the time it is given up to three times over: sockets, descriptors, access. Zero would mean its own
// default, and less than zero for ever.
int Connection::seconds_for(const Deadline &deadline) const { return std::max(1, deadline.remaining_ms() / 3000); }

Failure Connection::init(const Topology &topology, const std::string &name, const Deadline &deadline) {
  constexpr char kCall[] = "HcclCommInitClusterInfoMemConfig";
  const std::lock_guard<std::mutex> step(mutex_);
  peer_rank_ = topology.peer_rank;
  peer_regions_ = topology.peer_regions;
  ascend::HcclCommConfig config = ascend::make_comm_config(name.c_str());
  for (uint32_t wait_ms = kFirstRetryMs;; wait_ms = std::min(wait_ms * 2, kLastRetryMs)) {
    Failure failure;
    int code;
    {
      InitLock lock;
      failure = InitLock::acquire(kCall, deadline, &lock);
      if (!failure.ok()) return failure;
      ascend::HcclComm comm = nullptr;
      code = vendor_->hccl.HcclCommInitClusterInfoMemConfig(topology.rank_table.c_str(), topology.rank, &config, &comm);
      if (code == ascend::HCCL_SUCCESS) {
        comm_ = comm;
        return {};
      }
      failure = hccl_result(*vendor_, kCall, code, "cannot make the communicator");
    }
    if (code != ascend::HCCL_E_UNAVAIL || !pause_ms(jitter(wait_ms), deadline)) return failure;
    retries_.fetch_add(1);
  }
}

Failure Connection::bind_all(const Deadline &deadline) {
  InitLock lock;
  const Failure busy = InitLock::acquire("HcclCommBindMem", deadline, &lock);
  if (!busy.ok()) return busy;
  const auto &regions = distinct_;
  while (bound_ < regions.size()) {
    const Failure failure =
        hccl_result(*vendor_, "HcclCommBindMem", vendor_->hccl.HcclCommBindMem(comm_, regions[bound_]->vendor),
                    "cannot bind a region to the communicator");
    if (!failure.ok()) return failure;
    ++bound_;
  }
  return {};
}

Failure Connection::register_all() {
  const auto &regions = distinct_;
  if (std::max<size_t>(regions.size(), peer_regions_) > kMostPerCommunicator) {
    return make_failure(KVL_NO_RESOURCE, "HcclRegisterMem",
                        "%zu regions here and %u at the peer; this CANN exchanges at most %u a communicator: register "
                        "fewer, larger ones, or use CANN 8.5",
                        regions.size(), peer_regions_, kMostPerCommunicator);
  }
  while (bound_ < regions.size()) {
    const Region &region = *regions[bound_];
    ascend::HcclMemDesc desc{};
    const int code = vendor_->hccl.HcclRegisterMem(
        comm_, peer_rank_, region.kind == KVL_MEMORY_DEVICE ? ascend::HCCL_MEM_TYPE_DEVICE : ascend::HCCL_MEM_TYPE_HOST,
        reinterpret_cast<void *>(region.address), region.length, &desc);
    const Failure failure = hccl_result(*vendor_, "HcclRegisterMem", code, "cannot register a region with the peer");
    if (!failure.ok()) return failure;
    local_.push_back(desc);
    ++bound_;
  }
  return {};
}

Failure Connection::exchange(int seconds) {
  remote_.resize(kMostPerCommunicator);  // the vendor writes as many as the peer has, without looking
  ascend::HcclMemDescs ours{local_.data(), static_cast<ascend::u32>(local_.size())};
  ascend::HcclMemDescs theirs{remote_.data(), static_cast<ascend::u32>(remote_.size())};
  ascend::u32 count = 0;
  Failure failure = hccl_result(*vendor_, "HcclExchangeMemDesc",
                                vendor_->hccl.HcclExchangeMemDesc(comm_, peer_rank_, &ours, seconds, &theirs, &count),
                                "the peer did not join");
  if (!failure.ok()) return failure;
  remote_.resize(std::min<size_t>(count, remote_.size()));
  while (enabled_ < remote_.size()) {
    ascend::HcclMem mem{};
    failure =
        hccl_result(*vendor_, "HcclEnableMemAccess", vendor_->hccl.HcclEnableMemAccess(comm_, &remote_[enabled_], &mem),
                    "cannot open a region of the peer");
    if (!failure.ok()) return failure;
    ++enabled_;
  }
  return {};
}

Failure Connection::prepare(const Deadline &deadline) {
  const std::lock_guard<std::mutex> step(mutex_);
  if (!vendor_->global()) {
    const Failure failure = register_all();
    return failure.ok() ? exchange(seconds_for(deadline)) : failure;
  }
  const Failure failure = bind_all(deadline);
  if (!failure.ok()) return failure;
  const ascend::HcclPrepareConfig config{};
  return hccl_result(*vendor_, "HcclCommPrepare", vendor_->hccl.HcclCommPrepare(comm_, &config, seconds_for(deadline)),
                     "the two sides of the link did not come together");
}

// The last bound goes first, so that bound_ stays what is left when the vendor refuses one.
Failure Connection::unbind_all() {
  while (enabled_ > 0) {
    const int code = vendor_->hccl.HcclDisableMemAccess(comm_, &remote_[enabled_ - 1]);
    const Failure failure = hccl_result(*vendor_, "HcclDisableMemAccess", code, "cannot let go of the peer's region");
    if (!failure.ok()) return failure;
    --enabled_;
  }
  while (bound_ > 0) {
    const Failure failure =
        vendor_->global()
            ? hccl_result(*vendor_, "HcclCommUnbindMem",
                          vendor_->hccl.HcclCommUnbindMem(comm_, distinct_[bound_ - 1]->vendor),
                          "cannot unbind a region")
            : hccl_result(*vendor_, "HcclDeregisterMem", vendor_->hccl.HcclDeregisterMem(comm_, &local_[bound_ - 1]),
                          "cannot deregister a region");
    if (!failure.ok()) return failure;
    --bound_;
  }
  return {};
}

Failure Connection::take_down(const Deadline &deadline) {
  {
    // A stream that does not stop keeps the communicator, and this thread, as long as it takes.
    std::unique_lock<std::mutex> lock(lanes_mutex_);
    lanes_changed_.wait(lock, [this] { return lanes_.load() == 0; });
  }
  const std::lock_guard<std::mutex> step(mutex_);
  if (down_) return {};
  if (comm_ != nullptr) {
    InitLock lock;
    Failure failure = InitLock::acquire("HcclCommDestroy", deadline, &lock);
    if (failure.ok()) failure = unbind_all();
    if (!failure.ok()) return failure;
    int code = vendor_->hccl.HcclCommDestroy(comm_);
    while (code == ascend::HCCL_E_AGAIN && pause_ms(kDestroyAgainMs, deadline)) {
      code = vendor_->hccl.HcclCommDestroy(comm_);
    }
    failure = hccl_result(*vendor_, "HcclCommDestroy", code, "cannot destroy the communicator");
    if (!failure.ok()) return failure;
    comm_ = nullptr;
  }
  {
    const std::lock_guard<std::mutex> lock(lanes_mutex_);
    released_ = true;
    for (const uint64_t id : quarantined_) quarantine_->release(id);
    quarantined_.clear();
  }
  distinct_.clear();
  bindings_.drop();
  down_ = true;
  return {};
}

}  // namespace kvlink::hcomm
