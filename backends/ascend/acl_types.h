// ACL's types and values, declared by hand: kvlink builds without CANN and against any version of it.
//
// Names are the vendor's, in a namespace of our own, so that one translation unit may hold them against a real header.
// Sizes, offsets and values are those of the public headers (torch_npu 2.6.0 to 2.13.0, runtime v8.5.0).
#ifndef KVLINK_ASCEND_ACL_TYPES_H
#define KVLINK_ASCEND_ACL_TYPES_H

#include <cstddef>
#include <cstdint>

namespace kvlink::ascend {

using aclError = int;
using aclrtContext = void *;
using aclrtStream = void *;
using aclrtEvent = void *;

enum aclrtMemcpyKind : unsigned {
  ACL_MEMCPY_HOST_TO_HOST = 0,
  ACL_MEMCPY_HOST_TO_DEVICE = 1,
  ACL_MEMCPY_DEVICE_TO_HOST = 2,
  ACL_MEMCPY_DEVICE_TO_DEVICE = 3
};

enum aclrtMemMallocPolicy : unsigned {
  ACL_MEM_MALLOC_HUGE_FIRST = 0,
  ACL_MEM_MALLOC_HUGE_ONLY = 1,
  ACL_MEM_MALLOC_NORMAL_ONLY = 2
};

enum aclrtHostRegisterType : unsigned { ACL_HOST_REGISTER_MAPPED = 0 };

enum aclrtStreamStatus : unsigned {
  ACL_STREAM_STATUS_COMPLETE = 0,
  ACL_STREAM_STATUS_NOT_READY = 1,
  ACL_STREAM_STATUS_RESERVED = 0xFFFF
};

// Of aclrtQueryEventStatus. The deprecated aclrtQueryEvent has the inverse values; it is not used.
enum aclrtEventRecordedStatus : unsigned {
  ACL_EVENT_RECORDED_STATUS_NOT_READY = 0,
  ACL_EVENT_RECORDED_STATUS_COMPLETE = 1
};

enum aclrtMemLocationType : unsigned {
  ACL_MEM_LOCATION_TYPE_HOST = 0,  // pinned by the driver
  ACL_MEM_LOCATION_TYPE_DEVICE = 1,
  ACL_MEM_LOCATION_TYPE_UNREGISTERED = 2  // ordinary host memory
};

enum aclrtDevAttr : unsigned {
  ACL_DEV_ATTR_PHY_CHIP_ID = 402,
  ACL_DEV_ATTR_SUPER_POD_DEVIDE_ID = 403,  // the vendor's spelling
  ACL_DEV_ATTR_SUPER_POD_SERVER_ID = 404,
  ACL_DEV_ATTR_SUPER_POD_ID = 405
};

enum aclrtMemAttr : unsigned { ACL_DDR_MEM = 0, ACL_HBM_MEM = 1, ACL_HBM_MEM_HUGE = 4, ACL_HBM_MEM_NORMAL = 5 };

enum aclCANNPackageName : unsigned { ACL_PKG_NAME_CANN = 0, ACL_PKG_NAME_RUNTIME = 1, ACL_PKG_NAME_DRIVER = 7 };

struct aclrtMemLocation {
  uint32_t id;
  aclrtMemLocationType type;
};

struct aclrtPtrAttributes {
  aclrtMemLocation location;
  uint32_t pageSize;
  uint32_t rsv[4];
};

struct aclCANNPackageVersion {
  char version[128];
  char majorVersion[64];
  char minorVersion[64];
  char releaseVersion[64];
  char patchVersion[64];
  char reserved[128];
};

// The runtime's own pointer query, used where ACL lacks it. Its argument order is the reverse of ACL's.
using rtError_t = int32_t;

struct rtPointerAttributes_t {
  int32_t memoryType;  // RT_MEMORY_*
  int32_t locationType;
  uint32_t deviceID;
  uint32_t pageSize;
};

enum : int32_t { RT_MEMORY_TYPE_HOST = 1, RT_MEMORY_TYPE_DEVICE = 2, RT_MEMORY_TYPE_USER = 5 };

enum : aclError {
  ACL_SUCCESS = 0,
  ACL_ERROR_REPEAT_INITIALIZE = 100002,
  ACL_ERROR_COMPILING_STUB_MODE = 100039,
  ACL_ERROR_RT_INVALID_DEVICEID = 107001,
  ACL_ERROR_RT_CONTEXT_NULL = 107002,
  ACL_ERROR_RT_STREAM_CONTEXT = 107003,
  ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000,
  ACL_ERROR_RT_MEMORY_ALLOCATION = 207001,
  ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507046,
  ACL_ERROR_RT_EVENT_SYNC_TIMEOUT = 507047
};

constexpr uint64_t kStopOnFailure = 1;  // aclrtSetStreamFailureMode
constexpr uint32_t kEventSync = 0x1;    // aclrtCreateEventExWithFlag: ACL_EVENT_SYNC

static_assert(sizeof(aclError) == 4 && sizeof(rtError_t) == 4, "ACL status");
static_assert(sizeof(aclrtMemcpyKind) == 4 && sizeof(aclrtMemMallocPolicy) == 4 && sizeof(aclrtHostRegisterType) == 4 &&
                  sizeof(aclrtStreamStatus) == 4 && sizeof(aclrtEventRecordedStatus) == 4 &&
                  sizeof(aclrtMemLocationType) == 4 && sizeof(aclrtDevAttr) == 4 && sizeof(aclrtMemAttr) == 4,
              "ACL enums");
static_assert(sizeof(aclrtMemLocation) == 8 && alignof(aclrtMemLocation) == 4, "aclrtMemLocation");
static_assert(offsetof(aclrtMemLocation, id) == 0 && offsetof(aclrtMemLocation, type) == 4, "aclrtMemLocation");
static_assert(sizeof(aclrtPtrAttributes) == 28 && alignof(aclrtPtrAttributes) == 4, "aclrtPtrAttributes");
static_assert(offsetof(aclrtPtrAttributes, location) == 0 && offsetof(aclrtPtrAttributes, pageSize) == 8 &&
                  offsetof(aclrtPtrAttributes, rsv) == 12,
              "aclrtPtrAttributes");
static_assert(sizeof(aclCANNPackageVersion) == 512 && offsetof(aclCANNPackageVersion, majorVersion) == 128 &&
                  offsetof(aclCANNPackageVersion, patchVersion) == 320 &&
                  offsetof(aclCANNPackageVersion, reserved) == 384,
              "aclCANNPackageVersion");
static_assert(sizeof(rtPointerAttributes_t) == 16 && offsetof(rtPointerAttributes_t, pageSize) == 12,
              "rtPointerAttributes_t");

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_ACL_TYPES_H
