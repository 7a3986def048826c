#include "vendor.h"

#include <cstring>
#include <mutex>
#include <vector>

#include "ascend/errors.h"
#include "ascend/toolkit.h"

namespace kvlink::hixl_provider {
namespace {

using ascend::Library;

// Methods that the first public build of the library (8.5.0.alpha001) lacked; whoever has them has the rest.
constexpr const char *kTransferAsync =
    "_ZN4hixl4Hixl13TransferAsyncERKN2ge12AscendStringENS_10TransferOpERKSt6vectorINS_14TransferOpDescESaIS7_EERKNS_"
    "12TransferArgsERPv";
constexpr const char *kTransferStatus = "_ZN4hixl4Hixl17GetTransferStatusERKPvRNS_14TransferStatusE";

// A library that is missing because the whole toolkit is too old for it is told as that.
Failure explain_missing(Failure failure) {
  const ascend::Version cann = ascend::cann_version(ascend::find_toolkit(), nullptr);
  if (!cann.known() || cann.at_least(8, 5)) return failure;
  failure.message = "hixl needs CANN 8.5.0 or newer, and this is CANN " + cann.describe() +
                    ": use transfer_channel hccl, or install a newer CANN. " + failure.message;
  return failure;
}

Failure load_once(const kvlink_hixl_shim **out) {
  const ascend::AclApi *acl = nullptr;
  Failure failure = ascend::load_acl(&acl);
  if (!failure.ok()) return failure;
  Library metadef, hixl;
  failure = Library::open("libmetadef.so", Library::Scope::kGlobal, &metadef);
  if (!failure.ok()) return explain_missing(failure);
  failure = Library::open("libcann_hixl.so", Library::Scope::kGlobal, &hixl);
  if (!failure.ok()) return explain_missing(failure);
  std::vector<std::string> missing;
  for (const char *name : {kTransferAsync, kTransferStatus}) {
    if (hixl.find(name) == nullptr) missing.emplace_back(name);
  }
  if (!missing.empty()) return ascend::missing_symbols(hixl, missing, "8.5.0");

  Library shim;
  failure = Library::open_path(ascend::own_directory() + "/libkvlink_hixl_shim.so", Library::Scope::kLocal, &shim);
  if (!failure.ok()) return failure;
  const auto table = reinterpret_cast<kvlink_hixl_shim_fn>(shim.find("kvlink_hixl_shim_table"));
  if (table == nullptr) return ascend::missing_symbols(shim, {"kvlink_hixl_shim_table"}, "");
  const kvlink_hixl_shim *found = table();
  if (found->version != KVLINK_HIXL_SHIM_VERSION || found->struct_size < sizeof(kvlink_hixl_shim)) {
    return make_failure(KVL_UNAVAILABLE, "kvlink_hixl_shim_table",
                        "%s has version %u, this provider needs %d: reinstall kvlink-hixl", shim.path().c_str(),
                        found->version, KVLINK_HIXL_SHIM_VERSION);
  }
  *out = found;
  return {};
}

}  // namespace

Failure load_vendor(const kvlink_hixl_shim **shim) {
  static std::mutex mutex;
  static const kvlink_hixl_shim *loaded = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded == nullptr) {
    const Failure failure = load_once(&loaded);
    if (!failure.ok()) return failure;
  }
  *shim = loaded;
  return {};
}

Failure hixl_failure(const ascend::AclApi &acl, const char *call, uint32_t code, const std::string &what) {
  if (code == KVLINK_HIXL_EXCEPTION) {
    Failure failure = make_failure(
        KVL_INTERNAL, call, "%s: the vendor's code threw an exception; see its log (~/ascend/log)", what.c_str());
    failure.code = code;
    return failure;
  }
  // The catalogue knows the methods by their bare names.
  const char *method = std::strrchr(call, ':');
  Failure failure = ascend::vendor_failure(&acl, ascend::Vendor::kHixl, method == nullptr ? call : method + 1, code,
                                           "%s", what.c_str());
  failure.site = call;
  return failure;
}

HixlEngine::HixlEngine(const kvlink_hixl_shim *shim, std::shared_ptr<const ascend::Device> device)
    : shim_(shim), device_(std::move(device)) {}

Failure HixlEngine::initialize(const std::string &name, const kvlink_hixl_option *options, uint32_t option_count) {
  hixl_ = shim_->create();
  if (hixl_ == nullptr) return make_failure(KVL_NO_RESOURCE, "Hixl::Hixl", "cannot make the vendor's engine object");
  const uint32_t code = shim_->initialize(hixl_, name.c_str(), options, option_count);
  if (code != kSuccess) return hixl_failure(acl(), "Hixl::Initialize", code, "cannot serve at " + name);
  initialized_ = true;
  return {};
}

HixlEngine::~HixlEngine() {
  if (hixl_ == nullptr) return;
  const ascend::ContextGuard guard = device_->enter();
  // 8.5 leaves its "initialised" flag set: an engine that is finalized is destroyed and never called again.
  if (initialized_) shim_->finalize(hixl_);
  shim_->destroy(hixl_);
}

}  // namespace kvlink::hixl_provider
