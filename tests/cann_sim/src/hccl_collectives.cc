// The collectives of libhccl.so: there so that the library looks like itself; what they do is not simulated.
#include "call.h"
#include "hccl_abi.h"

namespace {

HcclResult not_simulated(const char *name) {
  cann_sim::Call call(name, cann_sim::Needs::kNothing);
  if (call.stop()) return static_cast<HcclResult>(call.code());
  return static_cast<HcclResult>(call.done(cann_sim::fail(1, HCCL_E_NOT_SUPPORT, "%s is not simulated", name)));
}

}  // namespace

extern "C" {

KVLINK_SIM_EXPORT HcclResult HcclAllReduce(void *, void *, u64, HcclDataType, int, HcclComm, rtStream_t) {
  return not_simulated("HcclAllReduce");
}
KVLINK_SIM_EXPORT HcclResult HcclAllGather(void *, void *, u64, HcclDataType, HcclComm, rtStream_t) {
  return not_simulated("HcclAllGather");
}
KVLINK_SIM_EXPORT HcclResult HcclBroadcast(void *, u64, HcclDataType, u32, HcclComm, rtStream_t) {
  return not_simulated("HcclBroadcast");
}
KVLINK_SIM_EXPORT HcclResult HcclReduceScatter(void *, void *, u64, HcclDataType, int, HcclComm, rtStream_t) {
  return not_simulated("HcclReduceScatter");
}
KVLINK_SIM_EXPORT HcclResult HcclSend(void *, u64, HcclDataType, u32, HcclComm, rtStream_t) {
  return not_simulated("HcclSend");
}
KVLINK_SIM_EXPORT HcclResult HcclRecv(void *, u64, HcclDataType, u32, HcclComm, rtStream_t) {
  return not_simulated("HcclRecv");
}

}  // extern "C"
