// HCCL's C interface as the vendor's libraries export it: values, layouts and prototypes, written by hand from the
// facts.
#pragma once

#include <cstddef>
#include <cstdint>

using u32 = unsigned int;
using u64 = unsigned long long;  // NOLINT: the vendor's own width and spelling
using HcclComm = void *;
using rtStream_t = void *;

enum HcclResult : int {
  HCCL_SUCCESS = 0,
  HCCL_E_PARA = 1,
  HCCL_E_PTR = 2,
  HCCL_E_MEMORY = 3,
  HCCL_E_INTERNAL = 4,
  HCCL_E_NOT_SUPPORT = 5,
  HCCL_E_NOT_FOUND = 6,
  HCCL_E_UNAVAIL = 7,
  HCCL_E_SYSCALL = 8,
  HCCL_E_TIMEOUT = 9,
  HCCL_E_OPEN_FILE_FAILURE = 10,
  HCCL_E_TCP_CONNECT = 11,
  HCCL_E_ROCE_CONNECT = 12,
  HCCL_E_TCP_TRANSFER = 13,
  HCCL_E_ROCE_TRANSFER = 14,
  HCCL_E_RUNTIME = 15,
  HCCL_E_DRV = 16,
  HCCL_E_PROFILING = 17,
  HCCL_E_CCE = 18,
  HCCL_E_NETWORK = 19,
  HCCL_E_AGAIN = 20,
  HCCL_E_REMOTE = 21,
  HCCL_E_SUSPENDING = 22,
  HCCL_E_OPRETRY_FAIL = 23,
  HCCL_E_OOM = 24,
};

enum HcclDataType : int {
  HCCL_DATA_TYPE_INT8 = 0,
  HCCL_DATA_TYPE_INT16 = 1,
  HCCL_DATA_TYPE_INT32 = 2,
  HCCL_DATA_TYPE_FP16 = 3,
  HCCL_DATA_TYPE_FP32 = 4,
  HCCL_DATA_TYPE_INT64 = 5,
  HCCL_DATA_TYPE_UINT64 = 6,
  HCCL_DATA_TYPE_UINT8 = 7,
  HCCL_DATA_TYPE_UINT16 = 8,
  HCCL_DATA_TYPE_UINT32 = 9,
  HCCL_DATA_TYPE_FP64 = 10,
  HCCL_DATA_TYPE_BFP16 = 11,
  HCCL_DATA_TYPE_INT128 = 12,
  HCCL_DATA_TYPE_HIF8 = 14,
  HCCL_DATA_TYPE_FP8E4M3 = 15,
  HCCL_DATA_TYPE_FP8E5M2 = 16,
  HCCL_DATA_TYPE_FP8E8M0 = 17,
  HCCL_DATA_TYPE_RESERVED = 255,
};

enum HcclMemType : int { HCCL_MEM_TYPE_DEVICE = 0, HCCL_MEM_TYPE_HOST = 1, HCCL_MEM_TYPE_NUM = 2 };
enum HcclTopoType : int { HCCL_TOPO_FULLMESH = 0, HCCL_TOPO_NUM = 1 };

constexpr std::size_t HCCL_MEM_DESC_LENGTH = 511;

struct HcclMemDesc {
  char desc[HCCL_MEM_DESC_LENGTH + 1];
};
struct HcclMemDescs {
  HcclMemDesc *array;
  u32 arrayLength;
};
struct HcclOneSideOpDesc {
  void *localAddr;
  void *remoteAddr;
  u64 count;
  HcclDataType dataType;
};
struct HcclPrepareConfig {
  HcclTopoType topoType;
  u64 rsvd0;
  u64 rsvd1;
  u64 rsvd2;
};
struct HcclMem {
  HcclMemType type;
  void *addr;
  std::uint64_t size;
};
struct HcclRootInfo {
  char internal[4108];
};

// The newest configuration any of the flavours knows (version 10, 2240 bytes). Callers may pass any older prefix.
struct HcclCommConfig {
  char reserved[24];  // ConfigInfo overlays it
  std::uint32_t hcclBufferSize;
  std::uint32_t hcclDeterministic;
  char hcclCommName[128];
  char hcclUdi[128];
  std::uint32_t hcclOpExpansionMode;
  std::uint32_t hcclRdmaTrafficClass;
  std::uint32_t hcclRdmaServiceLevel;
  std::uint32_t hcclWorldRankID;
  std::uint64_t hcclJobID;
  std::uint8_t aclGraphZeroCopyEnable;
  std::int32_t hcclExecTimeOut;
  char hcclAlgo[1600];
  char hcclRetryEnable[50];
  char hcclRetryParams[128];
  char hcclBufferName[128];
  std::uint32_t hcclQos;
  std::uint64_t hcclSymWinMaxMemSizePerRank;
};

static_assert(sizeof(HcclResult) == 4 && sizeof(HcclDataType) == 4 && sizeof(HcclMemType) == 4);
static_assert(sizeof(HcclMemDesc) == 512 && alignof(HcclMemDesc) == 1);
static_assert(sizeof(HcclMemDescs) == 16 && offsetof(HcclMemDescs, arrayLength) == 8);
static_assert(sizeof(HcclOneSideOpDesc) == 32 && offsetof(HcclOneSideOpDesc, remoteAddr) == 8 &&
              offsetof(HcclOneSideOpDesc, count) == 16 && offsetof(HcclOneSideOpDesc, dataType) == 24);
static_assert(sizeof(HcclPrepareConfig) == 32 && offsetof(HcclPrepareConfig, rsvd0) == 8);
static_assert(sizeof(HcclMem) == 24 && offsetof(HcclMem, addr) == 8 && offsetof(HcclMem, size) == 16);
static_assert(sizeof(HcclRootInfo) == 4108 && alignof(HcclRootInfo) == 1);
static_assert(sizeof(HcclCommConfig) == 2240 && offsetof(HcclCommConfig, hcclBufferSize) == 24 &&
              offsetof(HcclCommConfig, hcclCommName) == 32 && offsetof(HcclCommConfig, hcclUdi) == 160 &&
              offsetof(HcclCommConfig, hcclOpExpansionMode) == 288 &&
              offsetof(HcclCommConfig, hcclRdmaTrafficClass) == 292 &&
              offsetof(HcclCommConfig, hcclRdmaServiceLevel) == 296 &&
              offsetof(HcclCommConfig, hcclWorldRankID) == 300 && offsetof(HcclCommConfig, hcclJobID) == 304 &&
              offsetof(HcclCommConfig, aclGraphZeroCopyEnable) == 312 &&
              offsetof(HcclCommConfig, hcclExecTimeOut) == 316 && offsetof(HcclCommConfig, hcclAlgo) == 320 &&
              offsetof(HcclCommConfig, hcclRetryEnable) == 1920 && offsetof(HcclCommConfig, hcclRetryParams) == 1970 &&
              offsetof(HcclCommConfig, hcclBufferName) == 2098 && offsetof(HcclCommConfig, hcclQos) == 2228 &&
              offsetof(HcclCommConfig, hcclSymWinMaxMemSizePerRank) == 2232);

#define KVLINK_SIM_EXPORT __attribute__((visibility("default")))

extern "C" {
KVLINK_SIM_EXPORT HcclResult HcclCommInitClusterInfoMemConfig(const char *rankTableString, std::uint32_t rank,
                                                              HcclCommConfig *config, HcclComm *comm);
KVLINK_SIM_EXPORT HcclResult HcclCommDestroy(HcclComm comm);
KVLINK_SIM_EXPORT HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *asyncError);
KVLINK_SIM_EXPORT const char *HcclGetErrorString(HcclResult code);
KVLINK_SIM_EXPORT std::uint32_t HcclGetCommConfigCapability();

KVLINK_SIM_EXPORT HcclResult HcclRegisterGlobalMem(const HcclMem *mem, void **memHandle);
KVLINK_SIM_EXPORT HcclResult HcclDeregisterGlobalMem(void *memHandle);
KVLINK_SIM_EXPORT HcclResult HcclCommBindMem(HcclComm comm, void *memHandle);
KVLINK_SIM_EXPORT HcclResult HcclCommUnbindMem(HcclComm comm, void *memHandle);
KVLINK_SIM_EXPORT HcclResult HcclCommPrepare(HcclComm comm, const HcclPrepareConfig *prepareConfig,
                                             const int timeoutSec);

KVLINK_SIM_EXPORT HcclResult HcclRegisterMem(HcclComm comm, u32 remoteRank, int type, void *addr, u64 size,
                                             HcclMemDesc *desc);
KVLINK_SIM_EXPORT HcclResult HcclDeregisterMem(HcclComm comm, HcclMemDesc *desc);
KVLINK_SIM_EXPORT HcclResult HcclExchangeMemDesc(HcclComm comm, u32 remoteRank, HcclMemDescs *local, int timeoutSec,
                                                 HcclMemDescs *remote, u32 *actualNum);
KVLINK_SIM_EXPORT HcclResult HcclEnableMemAccess(HcclComm comm, HcclMemDesc *remoteMemDesc, HcclMem *remoteMem);
KVLINK_SIM_EXPORT HcclResult HcclDisableMemAccess(HcclComm comm, HcclMemDesc *remoteMemDesc);

KVLINK_SIM_EXPORT HcclResult HcclBatchPut(HcclComm comm, u32 remoteRank, HcclOneSideOpDesc *desc, u32 descNum,
                                          rtStream_t stream);
KVLINK_SIM_EXPORT HcclResult HcclBatchGet(HcclComm comm, u32 remoteRank, HcclOneSideOpDesc *desc, u32 descNum,
                                          rtStream_t stream);
}
