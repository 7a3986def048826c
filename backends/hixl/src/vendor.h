// The vendor's libraries and the shim over them, loaded in two stages and kept for the life of the process.
#ifndef KVLINK_HIXL_VENDOR_H
#define KVLINK_HIXL_VENDOR_H

#include <memory>
#include <string>

#include "../shim/shim_api.h"
#include "ascend/device.h"
#include "ascend/library.h"

namespace kvlink::hixl_provider {

using ascend::Failure;
using ascend::make_failure;

// Stage one: ACL, libmetadef.so and libcann_hixl.so into the global scope. Stage two: the shim beside this library,
// whose undefined names find them there. Later calls give the same answer.
Failure load_vendor(const kvlink_hixl_shim **shim);

// The vendor's statuses that this provider acts on.
constexpr uint32_t kSuccess = 0;
constexpr uint32_t kParamInvalid = 103900;
constexpr uint32_t kTimeout = 103901;
constexpr uint32_t kNotConnected = 103902;
constexpr uint32_t kAlreadyConnected = 103903;
constexpr uint32_t kResourceExhausted = 203900;
constexpr uint32_t kFailed = 503900;

// States of a request.
constexpr uint32_t kWaiting = 0;
constexpr uint32_t kCompleted = 1;

// A failed call of hixl::Hixl: "<what>: <code> <NAME>, <meaning>. <fix>". Call it in the thread that made the vendor
// call.
Failure hixl_failure(const ascend::AclApi &acl, const char *call, uint32_t code, const std::string &what);

// One hixl::Hixl. Whoever may be inside a call of it holds a reference, so that Finalize, which the destructor calls,
// never runs beside another call: the vendor forbids it.
class HixlEngine {
 public:
  HixlEngine(const kvlink_hixl_shim *shim, std::shared_ptr<const ascend::Device> device);
  ~HixlEngine();
  HixlEngine(const HixlEngine &) = delete;
  HixlEngine &operator=(const HixlEngine &) = delete;

  // A fresh object that serves at `name` ("ip:port"). On failure it may only be destroyed.
  Failure initialize(const std::string &name, const kvlink_hixl_option *options, uint32_t option_count);

  const kvlink_hixl_shim &shim() const { return *shim_; }
  kvlink_hixl *get() const { return hixl_; }
  const ascend::Device &device() const { return *device_; }
  const ascend::AclApi &acl() const { return device_->acl(); }

 private:
  const kvlink_hixl_shim *shim_;
  std::shared_ptr<const ascend::Device> device_;
  kvlink_hixl *hixl_ = nullptr;
  bool initialized_ = false;
};

// The name of a remote engine, and the batch being filled for it.
struct RemoteDeleter {
  const kvlink_hixl_shim *shim = nullptr;
  void operator()(kvlink_hixl_remote *remote) const { shim->remote_destroy(remote); }
};
using RemoteEngine = std::unique_ptr<kvlink_hixl_remote, RemoteDeleter>;

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_VENDOR_H
