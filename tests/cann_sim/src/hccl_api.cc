// HCCL's exported C functions.
#include "hccl_batch.h"
#include "hccl_comm.h"
#include "hccl_percomm.h"
#include "hccl_refused.h"
#include "sim.h"

using cann_sim::flavour;
using cann_sim::hccl::guarded;
using cann_sim::hccl::Refused;
namespace hccl = cann_sim::hccl;

namespace {

std::int64_t number(const void *pointer) { return reinterpret_cast<std::int64_t>(pointer); }

// Ascend950's implementation has the per-communicator flavour only.
void need_global_memory_api() {
  if (cann_sim::settings().soc == cann_sim::Soc::k950) {
    throw Refused(1, HCCL_E_NOT_SUPPORT, "Ascend950 has no process-granular one-sided memory");
  }
}

const char *const kResultNames[] = {"success",
                                    "parameter error",
                                    "empty pointer",
                                    "memory error",
                                    "internal error",
                                    "not supported",
                                    "not found",
                                    "resource unavailable",
                                    "syscall error",
                                    "timeout",
                                    "open file failure",
                                    "tcp connect failure",
                                    "roce connect failure",
                                    "tcp transfer failure",
                                    "roce transfer failure",
                                    "runtime api failure",
                                    "driver api failure",
                                    "profiling failure",
                                    "cce failure",
                                    "network api failure",
                                    "try again",
                                    "remote error",
                                    "suspending",
                                    "operation retry failure",
                                    "out of memory"};

}  // namespace

extern "C" {

HcclResult HcclCommInitClusterInfoMemConfig(const char *rankTableString, std::uint32_t rank, HcclCommConfig *config,
                                            HcclComm *comm) {
  const hccl::OneInitAtATime alone;
  HCCL_CALL("HcclCommInitClusterInfoMemConfig");
  call.note("rank", rank);
  return guarded(call, [&] {
    HcclComm made = hccl::create_comm(comm == nullptr ? nullptr : rankTableString, rank, config);
    *comm = made;
    call.note("comm", number(made));
  });
}

HcclResult HcclCommDestroy(HcclComm comm) {
  HCCL_CALL("HcclCommDestroy");
  call.note("comm", number(comm));
  return guarded(call, [&] { hccl::destroy_comm(comm); });
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *asyncError) {
  HCCL_CALL("HcclGetCommAsyncError");
  return guarded(call, [&] {
    const hccl::CommPtr found = hccl::find_comm(comm);
    if (asyncError == nullptr) throw Refused(20, HCCL_E_PTR, "EI0003: a null argument");
    *asyncError = static_cast<HcclResult>(found->async_error.load());
    call.note("async_error", *asyncError);
  });
}

const char *HcclGetErrorString(HcclResult code) {
  const auto index = static_cast<std::size_t>(code);
  return index < sizeof kResultNames / sizeof *kResultNames ? kResultNames[index] : "unknown error";
}

std::uint32_t HcclGetCommConfigCapability() { return flavour().number < 850 ? 6 : flavour().number < 900 ? 8 : 10; }

HcclResult HcclRegisterGlobalMem(const HcclMem *mem, void **memHandle) {
  HCCL_CALL("HcclRegisterGlobalMem");
  return guarded(call, [&] {
    need_global_memory_api();
    if (mem == nullptr) throw Refused(11, HCCL_E_PTR, "EI0003: mem is null");
    if (memHandle == nullptr) {
      if (hccl::old_tables())
        cann_sim::violation(33, "HcclRegisterGlobalMem with a null memHandle crashes on this release");
      throw Refused(11, HCCL_E_PTR, "EI0003: memHandle is null");
    }
    call.note("type", mem->type).note("addr", number(mem->addr)).note("size", static_cast<std::int64_t>(mem->size));
    const hccl::RegionPtr region = hccl::register_region(*mem);
    *memHandle = region->handle;
    call.note("handle", number(region->handle));
  });
}

HcclResult HcclDeregisterGlobalMem(void *memHandle) {
  HCCL_CALL("HcclDeregisterGlobalMem");
  call.note("handle", number(memHandle));
  return guarded(call, [&] {
    need_global_memory_api();
    hccl::deregister_region(memHandle);
  });
}

HcclResult HcclCommBindMem(HcclComm comm, void *memHandle) {
  HCCL_CALL("HcclCommBindMem");
  call.note("comm", number(comm)).note("handle", number(memHandle));
  return guarded(call, [&] {
    need_global_memory_api();
    hccl::bind(comm, memHandle);
  });
}

HcclResult HcclCommUnbindMem(HcclComm comm, void *memHandle) {
  HCCL_CALL("HcclCommUnbindMem");
  call.note("comm", number(comm)).note("handle", number(memHandle));
  return guarded(call, [&] {
    need_global_memory_api();
    hccl::unbind(comm, memHandle);
  });
}

HcclResult HcclCommPrepare(HcclComm comm, const HcclPrepareConfig *prepareConfig, const int timeoutSec) {
  HCCL_CALL("HcclCommPrepare");
  call.note("comm", number(comm)).note("timeout", timeoutSec);
  return guarded(call, [&] {
    need_global_memory_api();
    if (comm == nullptr || prepareConfig == nullptr) throw Refused(16, HCCL_E_PTR, "EI0003: a null argument");
    hccl::prepare(comm, timeoutSec);
  });
}

HcclResult HcclRegisterMem(HcclComm comm, u32 remoteRank, int type, void *addr, u64 size, HcclMemDesc *desc) {
  HCCL_CALL("HcclRegisterMem");
  call.note("comm", number(comm)).note("addr", number(addr)).note("size", static_cast<std::int64_t>(size));
  return guarded(call, [&] { hccl::register_own(comm, remoteRank, type, addr, size, desc); });
}

HcclResult HcclDeregisterMem(HcclComm comm, HcclMemDesc *desc) {
  HCCL_CALL("HcclDeregisterMem");
  call.note("comm", number(comm));
  return guarded(call, [&] { hccl::deregister_own(comm, desc); });
}

HcclResult HcclExchangeMemDesc(HcclComm comm, u32 remoteRank, HcclMemDescs *local, int timeoutSec, HcclMemDescs *remote,
                               u32 *actualNum) {
  HCCL_CALL("HcclExchangeMemDesc");
  call.note("comm", number(comm)).note("timeout", timeoutSec);
  return guarded(call, [&] { hccl::exchange_own(comm, remoteRank, local, timeoutSec, remote, actualNum); });
}

HcclResult HcclEnableMemAccess(HcclComm comm, HcclMemDesc *remoteMemDesc, HcclMem *remoteMem) {
  HCCL_CALL("HcclEnableMemAccess");
  call.note("comm", number(comm));
  return guarded(call, [&] { hccl::enable_access(comm, remoteMemDesc, remoteMem); });
}

HcclResult HcclDisableMemAccess(HcclComm comm, HcclMemDesc *remoteMemDesc) {
  HCCL_CALL("HcclDisableMemAccess");
  call.note("comm", number(comm));
  return guarded(call, [&] { hccl::disable_access(comm, remoteMemDesc); });
}

HcclResult HcclBatchPut(HcclComm comm, u32 remoteRank, HcclOneSideOpDesc *desc, u32 descNum, rtStream_t stream) {
  HCCL_CALL("HcclBatchPut");
  call.note("comm", number(comm)).note("descs", descNum);
  return guarded(call, [&] { hccl::batch(comm, remoteRank, desc, descNum, stream, true); });
}

HcclResult HcclBatchGet(HcclComm comm, u32 remoteRank, HcclOneSideOpDesc *desc, u32 descNum, rtStream_t stream) {
  HCCL_CALL("HcclBatchGet");
  call.note("comm", number(comm)).note("descs", descNum);
  return guarded(call, [&] { hccl::batch(comm, remoteRank, desc, descNum, stream, false); });
}

}  // extern "C"
