#include "ascend/hccl.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "ascend/toolkit.h"

namespace kvlink::ascend {

const HcclPolicy kHcclPolicy = {"hccl", {"libhcomm.so", "libhccl.so"}, true, "8.3"};
const HcclPolicy kHcommOnesidedPolicy = {"hcomm_onesided", {"libhcomm.so", nullptr}, false, "8.5"};

HcclCommConfig make_comm_config(const char *comm_name) {
  HcclCommConfig config;
  std::memset(&config, 0, sizeof config);
  config.size = kCommConfigBytes;
  config.magicWord = HCCL_COMM_CONFIG_MAGIC_WORD;
  config.version = kCommConfigVersion;
  config.hcclBufferSize = kCommConfigBufferMb;
  config.hcclDeterministic = kCommConfigNotSet;
  std::snprintf(config.hcclCommName, sizeof config.hcclCommName, "%s", comm_name);
  config.hcclRdmaTrafficClass = kCommConfigNotSet;
  config.hcclRdmaServiceLevel = kCommConfigNotSet;
  return config;
}

namespace {

struct Missing {
  std::vector<std::string> common, global, comm;
};

void fill(HcclApi *api, Missing *missing) {
  std::vector<std::string> optional;
  const auto take = [&](auto &slot, const char *name, std::vector<std::string> &need) {
    slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(api->library.find(name));
    if (slot == nullptr) need.emplace_back(name);
  };
  auto &common = missing->common;
  auto &global = missing->global;
  auto &comm = missing->comm;
#define KVLINK_HCCL(need, type, name, parameters) take(api->name, #name, need);
#include "ascend/hccl_functions.inc"
#undef KVLINK_HCCL
}

}  // namespace

Failure load_hccl(const HcclPolicy &policy, HcclApi *hccl) {
  Failure first;
  for (const char *soname : policy.libraries) {
    if (soname == nullptr) break;
    HcclApi api;
    Failure failure = Library::open(soname, Library::Scope::kLocal, &api.library);
    if (failure.ok()) {
      Missing missing;
      fill(&api, &missing);
      if (missing.common.empty() && missing.global.empty()) {
        api.flavour = HcclFlavour::kGlobal;
        *hccl = api;
        return {};
      }
      if (policy.allow_per_communicator && missing.common.empty() && missing.comm.empty()) {
        api.flavour = HcclFlavour::kPerCommunicator;
        *hccl = api;
        return {};
      }
      std::vector<std::string> names = missing.common;
      names.insert(names.end(), missing.global.begin(), missing.global.end());
      failure = missing_symbols(api.library, names, policy.minimum);
    }
    // Of two libraries the one that loaded says more than the one that is not there.
    if (first.ok() || (first.site == "dlopen" && failure.site != "dlopen")) first = failure;
  }
  const Version cann = cann_version(find_toolkit(), nullptr);
  const std::string here = cann.known() ? ", and this is CANN " + cann.describe() : "";
  first.message =
      std::string(policy.provider) + " needs CANN " + policy.minimum + " or later" + here + ": " + first.message;
  return first;
}

}  // namespace kvlink::ascend
