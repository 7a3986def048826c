#include "ascend/device.h"

#include <cinttypes>
#include <cstring>
#include <mutex>
#include <set>

#include "ascend/errors.h"

namespace kvlink::ascend {
namespace {

Failure acl_failure(const AclApi &acl, const char *call, aclError code, const std::string &what) {
  return vendor_failure(&acl, Vendor::kAcl, call, code, "%s", what.c_str());
}

aclrtContext current_context(const AclApi &acl) {
  aclrtContext context = nullptr;
  return acl.aclrtGetCurrentContext(&context) == ACL_SUCCESS ? context : nullptr;
}

// Ready for use, whoever made it so. Never undone: the process's other users go on.
Failure initialise(const AclApi &acl) {
  if (acl.library.is_stub()) {
    return make_failure(
        KVL_UNAVAILABLE, "dlopen",
        "%s is a link-time stub: the NPU driver is not visible; mount /usr/local/Ascend/driver and source "
        "set_env.sh again",
        acl.library.path().c_str());
  }
  const aclError code = acl.aclInit(nullptr);
  if (code == ACL_SUCCESS || code == ACL_ERROR_REPEAT_INITIALIZE) return {};
  Failure failure = acl_failure(acl, "aclInit", code, "ACL did not initialise");
  failure.status = KVL_UNAVAILABLE;
  return failure;
}

Failure count_devices(const AclApi &acl, uint32_t *count) {
  const aclError code = acl.aclrtGetDeviceCount(count);
  if (code != ACL_SUCCESS || *count == 0) {
    Failure failure = code != ACL_SUCCESS
                          ? acl_failure(acl, "aclrtGetDeviceCount", code, "the NPUs could not be counted")
                          : make_failure(KVL_UNAVAILABLE, "aclrtGetDeviceCount",
                                         "no NPU is visible: check npu-smi info and that /dev/davinci* is mounted");
    failure.status = KVL_UNAVAILABLE;
    return failure;
  }
  return {};
}

// True when the caller's reference is this process's first on the device, which is never given back: a thread that had
// no context keeps the device's (ACL has no way to set none), and a reset would leave it with a dead one.
bool keep_first_reference(int32_t device) {
  static std::mutex mutex;
  static std::set<int32_t> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  return kept.insert(device).second;
}

}  // namespace

SocFamily soc_family(const std::string &name) {
  const auto starts = [&name](const char *prefix) { return name.compare(0, std::strlen(prefix), prefix) == 0; };
  if (starts("Ascend910B")) return SocFamily::kA2;
  if (starts("Ascend910_93")) return SocFamily::kA3;
  if (starts("Ascend950")) return SocFamily::k950;
  return SocFamily::kOther;
}

const char *soc_family_name(SocFamily family) {
  switch (family) {
    case SocFamily::kA2:
      return "A2 (910B)";
    case SocFamily::kA3:
      return "A3 (910_93)";
    case SocFamily::k950:
      return "Ascend950";
    default:
      return "another SoC";
  }
}

ContextGuard::ContextGuard(const AclApi &acl, aclrtContext context) : acl_(acl) {
  const aclrtContext before = current_context(acl);
  if (before == context) return;
  const aclError code = acl.aclrtSetCurrentContext(context);
  if (code != ACL_SUCCESS) {
    failure_ = acl_failure(acl, "aclrtSetCurrentContext", code, "the device's context cannot be used in this thread");
    return;
  }
  before_ = before;
}

ContextGuard::~ContextGuard() {
  if (before_ != nullptr) static_cast<void>(acl_.aclrtSetCurrentContext(before_));
}

RestoreContext::RestoreContext(const AclApi &acl) : acl_(acl), before_(current_context(acl)) {}

RestoreContext::~RestoreContext() {
  if (before_ != nullptr && current_context(acl_) != before_) {
    static_cast<void>(acl_.aclrtSetCurrentContext(before_));
  }
}

Failure parse_device(const char *text, int32_t *device) {
  const std::string name = text == nullptr ? "" : text;
  *device = 0;
  if (name == "npu") return {};
  const std::string digits = name.compare(0, 4, "npu:") == 0 ? name.substr(4) : "";
  if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos) {
    return make_failure(KVL_INVALID, "engine_open",
                        "device is '%.40s'; an Ascend provider needs 'npu:N', such as 'npu:0'", name.c_str());
  }
  *device = std::stoi(digits);
  return {};
}

Failure Device::open(int32_t device, std::unique_ptr<Device> *out) {
  std::unique_ptr<Device> opened(new Device);
  const Failure failure = opened->start(device);
  if (failure.ok()) *out = std::move(opened);
  return failure;
}

Failure Device::start(int32_t device) {
  id_ = device;
  Failure failure = load_acl(&acl_);
  if (!failure.ok()) return failure;
  failure = initialise(*acl_);
  if (!failure.ok()) return failure;
  uint32_t count = 0;
  failure = count_devices(*acl_, &count);
  if (!failure.ok()) return failure;
  if (device < 0 || static_cast<uint32_t>(device) >= count) {
    return make_failure(KVL_INVALID, "engine_open",
                        "device npu:%d does not exist: this process sees %u NPU(s), npu:0 to npu:%u; check "
                        "ASCEND_RT_VISIBLE_DEVICES",
                        device, count, count - 1);
  }
  const RestoreContext restore(*acl_);
  aclError code = acl_->aclrtSetDevice(device);
  if (code != ACL_SUCCESS) {
    return acl_failure(*acl_, "aclrtSetDevice", code, "npu:" + std::to_string(device) + " cannot be used");
  }
  referenced_ = !keep_first_reference(device);
  code = acl_->aclrtGetCurrentContext(&context_);
  if (code != ACL_SUCCESS) {
    return acl_failure(*acl_, "aclrtGetCurrentContext", code, "npu:" + std::to_string(device) + " has no context");
  }
  ask_identity();
  return {};
}

Device::~Device() {
  if (!referenced_) return;
  const ContextGuard guard(*acl_, context_);
  static_cast<void>(acl_->aclrtResetDevice(id_));
}

void Device::ask_identity() {
  const char *soc = acl_->aclrtGetSocName();
  soc_name_ = soc == nullptr ? "" : soc;
  soc_ = soc_family(soc_name_);
  // The misnamed call takes the user id as well; the right one came with 9.1.
  const auto ask_physical = acl_->aclrtGetPhyDevIdByUserDevId != nullptr ? acl_->aclrtGetPhyDevIdByUserDevId
                                                                         : acl_->aclrtGetPhyDevIdByLogicDevId;
  int32_t physical = -1;
  uint32_t index = 0;
  if (ask_physical != nullptr && ask_physical(id_, &physical) == ACL_SUCCESS) {
    physical_ = physical;
  } else if (acl_->rtGetDevicePhyIdByIndex != nullptr &&
             acl_->rtGetDevicePhyIdByIndex(static_cast<uint32_t>(id_), &index) == 0) {
    physical_ = static_cast<int32_t>(index);
  }
  if (acl_->aclrtGetDeviceInfo != nullptr && soc_ == SocFamily::kA3) {
    int64_t value = -1;
    const auto device = static_cast<uint32_t>(id_);
    if (acl_->aclrtGetDeviceInfo(device, ACL_DEV_ATTR_SUPER_POD_DEVIDE_ID, &value) == ACL_SUCCESS) {
      super_device_id_ = value;
    }
    if (acl_->aclrtGetDeviceInfo(device, ACL_DEV_ATTR_SUPER_POD_ID, &value) == ACL_SUCCESS) super_pod_id_ = value;
  }
  toolkit_ = find_toolkit();
  cann_ = cann_version(toolkit_, acl_);
  driver_ = driver_version();
  // A query that failed leaves its message behind; the next error must not be blamed with it.
  static_cast<void>(acl_->recent_message());
}

Failure probe_device() {
  const AclApi *acl = nullptr;
  Failure failure = load_acl(&acl);
  if (!failure.ok()) return failure;
  failure = initialise(*acl);
  if (!failure.ok()) return failure;
  uint32_t count = 0;
  return count_devices(*acl, &count);
}

PointerKind pointer_kind(const AclApi &acl, const void *address) {
  if (acl.aclrtPointerGetAttributes != nullptr) {
    aclrtPtrAttributes attributes{};
    if (acl.aclrtPointerGetAttributes(address, &attributes) != ACL_SUCCESS) {
      static_cast<void>(acl.recent_message());
      return PointerKind::kHost;
    }
    if (attributes.location.type == ACL_MEM_LOCATION_TYPE_DEVICE) return PointerKind::kDevice;
    return attributes.location.type == ACL_MEM_LOCATION_TYPE_HOST ? PointerKind::kPinnedHost : PointerKind::kHost;
  }
  if (acl.rtPointerGetAttributes != nullptr) {
    rtPointerAttributes_t attributes{};
    if (acl.rtPointerGetAttributes(&attributes, address) != 0) return PointerKind::kHost;
    if (attributes.memoryType == RT_MEMORY_TYPE_HOST) return PointerKind::kPinnedHost;
    return attributes.memoryType == RT_MEMORY_TYPE_USER ? PointerKind::kHost : PointerKind::kDevice;
  }
  return PointerKind::kHost;
}

Failure allocate_device(const AclApi &acl, uint64_t length, void **address) {
  const uint64_t rounded = (length + kHugePage - 1) / kHugePage * kHugePage;
  if (length == 0 || rounded < length) {
    return make_failure(KVL_INVALID, "mem_alloc", "length %" PRIu64 " bytes", length);
  }
  void *memory = nullptr;
  // Only whole huge pages start at a multiple of 2 MiB.
  aclError code = acl.aclrtMalloc(&memory, rounded, ACL_MEM_MALLOC_HUGE_ONLY);
  if (code != ACL_SUCCESS) {
    return acl_failure(acl, "aclrtMalloc", code, std::to_string(rounded) + " bytes of huge-page device memory");
  }
  if (reinterpret_cast<uint64_t>(memory) % kHugePage != 0) {
    static_cast<void>(acl.aclrtFree(memory));
    return make_failure(KVL_NO_RESOURCE, "aclrtMalloc", "huge-page memory at %p is not aligned to 2 MiB", memory);
  }
  code = acl.aclrtMemset(memory, rounded, 0, rounded);
  if (code != ACL_SUCCESS) {
    static_cast<void>(acl.aclrtFree(memory));
    return acl_failure(acl, "aclrtMemset", code, "new device memory cannot be cleared");
  }
  *address = memory;
  return {};
}

Failure allocate_pinned(const AclApi &acl, uint64_t length, void **address) {
  constexpr uint64_t page = 4096;
  const uint64_t rounded = (length + page - 1) / page * page;
  if (length == 0 || rounded < length) {
    return make_failure(KVL_INVALID, "mem_alloc", "length %" PRIu64 " bytes", length);
  }
  void *memory = nullptr;
  const aclError code = acl.aclrtMallocHost(&memory, rounded);
  if (code != ACL_SUCCESS) {
    return acl_failure(acl, "aclrtMallocHost", code, std::to_string(rounded) + " bytes of pinned host memory");
  }
  std::memset(memory, 0, rounded);
  *address = memory;
  return {};
}

}  // namespace kvlink::ascend
