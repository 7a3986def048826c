// The per-communicator flavour of the one-sided service (facts 3.10), what a library without HcclCommPrepare offers.
#pragma once

#include "hccl_abi.h"

namespace cann_sim::hccl {

// All throw Refused.
void register_own(HcclComm handle, std::uint32_t peer, int type, void *address, std::uint64_t size, HcclMemDesc *desc);
void deregister_own(HcclComm handle, const HcclMemDesc *desc);
void exchange_own(HcclComm handle, std::uint32_t peer, const HcclMemDescs *local, int timeout_s, HcclMemDescs *remote,
                  std::uint32_t *count);
void enable_access(HcclComm handle, const HcclMemDesc *desc, HcclMem *memory);
void disable_access(HcclComm handle, const HcclMemDesc *desc);

}  // namespace cann_sim::hccl
