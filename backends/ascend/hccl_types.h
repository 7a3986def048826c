// HCCL's one-sided types and values, declared by hand (hcomm v8.5.0 to v9.1.0-beta.1, torch_npu 2.13.0).
//
// The communicator configuration is declared up to version 5 and no further: every known library accepts it, and a
// version whose fields lie beyond the size given is read from garbage.
#ifndef KVLINK_ASCEND_HCCL_TYPES_H
#define KVLINK_ASCEND_HCCL_TYPES_H

#include <cstddef>
#include <cstdint>

#include "ascend/acl_types.h"

namespace kvlink::ascend {

using HcclComm = void *;
using rtStream_t = void *;  // the same object as aclrtStream
using u32 = unsigned int;
using u64 = unsigned long long;

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
  HCCL_E_IN_STATUS = 1041
};

enum HcclDataType : unsigned { HCCL_DATA_TYPE_UINT8 = 7 };
enum HcclMemType : int { HCCL_MEM_TYPE_DEVICE = 0, HCCL_MEM_TYPE_HOST = 1 };
enum HcclTopoType : unsigned { HCCL_TOPO_FULLMESH = 0 };

struct HcclMem {
  HcclMemType type;
  void *addr;
  uint64_t size;
};

struct HcclOneSideOpDesc {
  void *localAddr;
  void *remoteAddr;
  u64 count;  // elements; bytes with HCCL_DATA_TYPE_UINT8
  HcclDataType dataType;
};

struct HcclPrepareConfig {
  HcclTopoType topoType;
  u64 rsvd0;
  u64 rsvd1;
  u64 rsvd2;
};

constexpr size_t HCCL_MEM_DESC_LENGTH = 511;

// Opaque bytes of the per-communicator flavour.
struct HcclMemDesc {
  char desc[HCCL_MEM_DESC_LENGTH + 1];
};

struct HcclMemDescs {
  HcclMemDesc *array;
  u32 arrayLength;
};

constexpr size_t COMM_NAME_MAX_LENGTH = 128;  // the ending NUL included
constexpr size_t UDI_MAX_LENGTH = 128;
constexpr uint32_t HCCL_COMM_CONFIG_MAGIC_WORD = 0xf0f0f0f0;
constexpr uint32_t kCommConfigVersion = 5;
constexpr uint32_t kCommConfigNotSet = 0xffffffff;
constexpr uint32_t kCommConfigBufferMb =
    200;  // of collectives, made by the first one: never by a one-sided communicator

// HcclCommConfig, version 5. The first 24 bytes are `reserved` in the vendor's header.
struct HcclCommConfig {
  size_t size;
  uint32_t magicWord;
  uint32_t version;
  uint64_t reservedWord;
  uint32_t hcclBufferSize;
  uint32_t hcclDeterministic;
  char hcclCommName[COMM_NAME_MAX_LENGTH];
  char hcclUdi[UDI_MAX_LENGTH];
  uint32_t hcclOpExpansionMode;
  uint32_t hcclRdmaTrafficClass;
  uint32_t hcclRdmaServiceLevel;
};

// The bytes that version 5 has; sizeof rounds them up to the struct's alignment.
constexpr size_t kCommConfigBytes = 300;

static_assert(sizeof(HcclResult) == 4 && sizeof(HcclDataType) == 4 && sizeof(HcclMemType) == 4 &&
                  sizeof(HcclTopoType) == 4,
              "HCCL enums");
static_assert(sizeof(HcclMem) == 24 && alignof(HcclMem) == 8, "HcclMem");
static_assert(offsetof(HcclMem, type) == 0 && offsetof(HcclMem, addr) == 8 && offsetof(HcclMem, size) == 16, "HcclMem");
static_assert(sizeof(HcclOneSideOpDesc) == 32 && alignof(HcclOneSideOpDesc) == 8, "HcclOneSideOpDesc");
static_assert(offsetof(HcclOneSideOpDesc, localAddr) == 0 && offsetof(HcclOneSideOpDesc, remoteAddr) == 8 &&
                  offsetof(HcclOneSideOpDesc, count) == 16 && offsetof(HcclOneSideOpDesc, dataType) == 24,
              "HcclOneSideOpDesc");
static_assert(sizeof(HcclPrepareConfig) == 32 && alignof(HcclPrepareConfig) == 8, "HcclPrepareConfig");
static_assert(offsetof(HcclPrepareConfig, topoType) == 0 && offsetof(HcclPrepareConfig, rsvd0) == 8 &&
                  offsetof(HcclPrepareConfig, rsvd1) == 16 && offsetof(HcclPrepareConfig, rsvd2) == 24,
              "HcclPrepareConfig");
static_assert(sizeof(HcclMemDesc) == 512 && alignof(HcclMemDesc) == 1, "HcclMemDesc");
static_assert(sizeof(HcclMemDescs) == 16 && offsetof(HcclMemDescs, arrayLength) == 8, "HcclMemDescs");
static_assert(offsetof(HcclCommConfig, size) == 0 && offsetof(HcclCommConfig, magicWord) == 8 &&
                  offsetof(HcclCommConfig, version) == 12 && offsetof(HcclCommConfig, reservedWord) == 16,
              "HcclCommConfig: the version header");
static_assert(offsetof(HcclCommConfig, hcclBufferSize) == 24 && offsetof(HcclCommConfig, hcclDeterministic) == 28 &&
                  offsetof(HcclCommConfig, hcclCommName) == 32 && offsetof(HcclCommConfig, hcclUdi) == 160 &&
                  offsetof(HcclCommConfig, hcclOpExpansionMode) == 288 &&
                  offsetof(HcclCommConfig, hcclRdmaTrafficClass) == 292 &&
                  offsetof(HcclCommConfig, hcclRdmaServiceLevel) == 296,
              "HcclCommConfig");
static_assert(offsetof(HcclCommConfig, hcclRdmaServiceLevel) + sizeof(uint32_t) == kCommConfigBytes &&
                  alignof(HcclCommConfig) == 8,
              "HcclCommConfig: version 5 ends here");

// What HcclCommConfigInit, an inline function of the vendor's header, would fill; the name must not be empty.
HcclCommConfig make_comm_config(const char *comm_name);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_HCCL_TYPES_H
