// The ACL types and values the simulator implements, written from the project's facts (sections 2.2 and 2.3).
#pragma once

#include <cstddef>
#include <cstdint>

#include "settings.h"

#define ACL_EXPORT extern "C" SIM_API

namespace cann_sim {

struct aclrtMemLocation {
  uint32_t id;
  uint32_t type;
};
struct aclrtPtrAttributes {
  aclrtMemLocation location;
  uint32_t pageSize;
  uint32_t rsv[4];
};
struct rtPointerAttributes_t {
  int32_t memoryType;
  int32_t locationType;
  uint32_t deviceID;
  uint32_t pageSize;
};
struct aclCANNPackageVersion {
  char version[128];
  char majorVersion[64];
  char minorVersion[64];
  char releaseVersion[64];
  char patchVersion[64];
  char reserved[128];
};

static_assert(sizeof(aclrtMemLocation) == 8 && alignof(aclrtMemLocation) == 4, "");
static_assert(sizeof(aclrtPtrAttributes) == 28 && alignof(aclrtPtrAttributes) == 4, "");
static_assert(offsetof(aclrtPtrAttributes, pageSize) == 8 && offsetof(aclrtPtrAttributes, rsv) == 12, "");
static_assert(sizeof(rtPointerAttributes_t) == 16 && offsetof(rtPointerAttributes_t, deviceID) == 8, "");
static_assert(sizeof(aclCANNPackageVersion) == 512, "");

enum LocationType : uint32_t { kLocationHost = 0, kLocationDevice = 1, kLocationUnregistered = 2 };
enum RtMemoryType : int32_t { kRtHost = 1, kRtDevice = 2, kRtUser = 5 };
enum CopyKind : int {
  kHostToHost = 0,
  kHostToDevice = 1,
  kDeviceToHost = 2,
  kDeviceToDevice = 3,
  kDefault = 4,  // this one and the next: 8.5 on
  kHostToBufferToDevice = 5,
  kInnerDevice = 6,
  kInterDevice = 7,
};

}  // namespace cann_sim
