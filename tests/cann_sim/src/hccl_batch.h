// HcclBatchPut and HcclBatchGet (rules 20 to 25).
#pragma once

#include "hccl_abi.h"

namespace cann_sim::hccl {

void batch(HcclComm handle, std::uint32_t peer, const HcclOneSideOpDesc *descs, std::uint32_t count, rtStream_t stream,
           bool put);

}  // namespace cann_sim::hccl
