// The HCCL functions HIXL uses, found in libhcomm.so as the vendor's engine finds them, and one link made of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "hccl_abi.h"
#include "hixl_name.h"

namespace cann_sim::hixl_sim {

struct HcclApi {
  decltype(&::HcclCommInitClusterInfoMemConfig) init = nullptr;
  decltype(&::HcclCommDestroy) destroy = nullptr;
  decltype(&::HcclRegisterGlobalMem) register_memory = nullptr;
  decltype(&::HcclDeregisterGlobalMem) deregister_memory = nullptr;
  decltype(&::HcclCommBindMem) bind = nullptr;
  decltype(&::HcclCommUnbindMem) unbind = nullptr;
  decltype(&::HcclCommPrepare) prepare = nullptr;
  decltype(&::HcclBatchPut) put = nullptr;
  decltype(&::HcclBatchGet) get = nullptr;
};
// Throws Refused(503900) when libhcomm.so or a function is missing.
const HcclApi &hccl_api();

// A communicator of two engines with everything that was registered bound to it.
class HcclLink {
 public:
  HcclLink() = default;
  ~HcclLink() { close(); }
  HcclLink(const HcclLink &) = delete;
  HcclLink &operator=(const HcclLink &) = delete;

  // Initialises, binds and prepares; throws Refused and leaves nothing behind. In the engine's context.
  void open(const std::string &name, const Merged &ranks, const std::vector<void *> &memories, int timeout_ms,
            std::uint32_t traffic_class, std::uint32_t service_level);
  void close();  // waits a moment for what is still running on aborted streams
  HcclComm comm() const { return comm_; }
  std::uint32_t peer_rank() const { return peer_rank_; }

 private:
  std::atomic<HcclComm> comm_{nullptr};  // other sessions ask whether there is one
  std::uint32_t peer_rank_ = 0;
  std::vector<void *> bound_;
};

}  // namespace cann_sim::hixl_sim
