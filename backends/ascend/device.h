// One NPU as this engine uses it: ACL ready, a device reference, its context, and what the device is.
#ifndef KVLINK_ASCEND_DEVICE_H
#define KVLINK_ASCEND_DEVICE_H

#include <memory>
#include <string>

#include "ascend/acl.h"
#include "ascend/toolkit.h"

namespace kvlink::ascend {

enum class SocFamily : uint32_t { kOther = 0, kA2 = 1, kA3 = 2, k950 = 3 };

SocFamily soc_family(const std::string &soc_name);
const char *soc_family_name(SocFamily family);

// Makes the engine's context current in this thread and puts the caller's back (torch_npu caches its device per
// thread). A thread that had none keeps ours: ACL has no way to set none. Cheap when the context is current already.
class ContextGuard {
 public:
  ContextGuard(const AclApi &acl, aclrtContext context);
  ~ContextGuard();
  ContextGuard(const ContextGuard &) = delete;
  ContextGuard &operator=(const ContextGuard &) = delete;
  const Failure &failure() const { return failure_; }
  bool ok() const { return failure_.ok(); }

 private:
  const AclApi &acl_;
  aclrtContext before_ = nullptr;
  Failure failure_;
};

// Puts the caller's context back, whatever happened in between: for calls that set a device themselves.
class RestoreContext {
 public:
  explicit RestoreContext(const AclApi &acl);
  ~RestoreContext();
  RestoreContext(const RestoreContext &) = delete;
  RestoreContext &operator=(const RestoreContext &) = delete;

 private:
  const AclApi &acl_;
  aclrtContext before_ = nullptr;
};

// "npu:3" -> 3, also "npu" -> 0. INVALID for everything else, naming what is expected.
Failure parse_device(const char *text, int32_t *device);

class Device {
 public:
  // aclInit (a second one is fine), the device's reference for the life of this object, its default context, and what
  // the device says about itself. The caller's context is as before when it returns.
  static Failure open(int32_t device, std::unique_ptr<Device> *out);
  // Gives the reference back, but for the process's first one. Never aclFinalize, never a forced reset: the process's
  // other users go on.
  ~Device();
  Device(const Device &) = delete;
  Device &operator=(const Device &) = delete;

  const AclApi &acl() const { return *acl_; }
  int32_t id() const { return id_; }                 // user id, what aclrtSetDevice takes
  int32_t physical_id() const { return physical_; }  // what hccn.conf and rank tables call it; -1 if unknown
  aclrtContext context() const { return context_; }
  SocFamily soc() const { return soc_; }
  const std::string &soc_name() const { return soc_name_; }
  int64_t super_device_id() const { return super_device_id_; }  // -1: not in a super-pod
  int64_t super_pod_id() const { return super_pod_id_; }
  const Toolkit &toolkit() const { return toolkit_; }
  const Version &cann() const { return cann_; }
  const Version &driver() const { return driver_; }

  // Puts the engine's context in place for one entry.
  ContextGuard enter() const { return {*acl_, context_}; }

 private:
  Device() = default;
  Failure start(int32_t device);
  void ask_identity();

  const AclApi *acl_ = nullptr;
  int32_t id_ = 0, physical_ = -1;
  bool referenced_ = false;
  aclrtContext context_ = nullptr;
  SocFamily soc_ = SocFamily::kOther;
  std::string soc_name_;
  int64_t super_device_id_ = -1, super_pod_id_ = -1;
  Toolkit toolkit_;
  Version cann_, driver_;
};

// What probe() of every Ascend provider does first, in its child process: ACL loads and a device is there.
Failure probe_device();

enum class PointerKind { kHost, kPinnedHost, kDevice };

// What lies at `address`. A query that fails (mapped files, NUMA memory) means host. Needs a current context.
PointerKind pointer_kind(const AclApi &acl, const void *address);

constexpr uint64_t kHugePage = uint64_t{2} << 20;  // HCCS links want device memory to start at a multiple of it

// 2 MiB-aligned huge-page device memory, zeroed; pinned host memory, zeroed. Need a current context.
Failure allocate_device(const AclApi &acl, uint64_t length, void **address);
Failure allocate_pinned(const AclApi &acl, uint64_t length, void **address);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_DEVICE_H
