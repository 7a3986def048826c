#include "ascend/acl.h"

#include <cstring>
#include <mutex>
#include <vector>

namespace kvlink::ascend {
namespace {

Failure load_table(AclApi *acl) {
  Failure failure = Library::open("libascendcl.so", Library::Scope::kLocal, &acl->library);
  if (!failure.ok()) return failure;
  std::vector<std::string> missing;
  const auto take = [&](auto &slot, const char *name, bool required) {
    slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(acl->library.find(name));
    if (slot == nullptr && required) missing.emplace_back(name);
  };
  constexpr bool required = true, optional = false;
#define KVLINK_ACL(need, type, name, parameters) take(acl->name, #name, need);
#include "ascend/acl_functions.inc"
#undef KVLINK_ACL
  static_cast<void>(optional);
  if (!missing.empty()) return missing_symbols(acl->library, missing, "8.3");
  if (acl->aclrtPointerGetAttributes != nullptr && acl->aclrtGetPhyDevIdByLogicDevId != nullptr) return {};
  Library runtime;
  if (!Library::open("libruntime.so", Library::Scope::kLocal, &runtime).ok()) return {};  // only fallbacks are in it
#define KVLINK_RT(need, type, name, parameters) acl->name = reinterpret_cast<decltype(acl->name)>(runtime.find(#name));
#include "ascend/rt_functions.inc"
#undef KVLINK_RT
  return {};
}

}  // namespace

std::string AclApi::recent_message() const {
  if (aclGetRecentErrMsg == nullptr) return {};
  const char *text = aclGetRecentErrMsg();
  if (text == nullptr) return {};
  std::string line;
  for (const char *at = text; *at != '\0'; ++at) {
    const bool space = *at == '\n' || *at == '\r' || *at == '\t' || *at == ' ';
    if (!space) {
      line.push_back(*at);
    } else if (!line.empty() && line.back() != ' ') {
      line.push_back(' ');
    }
  }
  if (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

Failure load_acl(const AclApi **acl) {
  static std::mutex mutex;
  static AclApi *table = nullptr;  // never freed: engines may still be closing while the process ends
  const std::lock_guard<std::mutex> lock(mutex);
  if (table == nullptr) {
    auto *fresh = new AclApi;
    const Failure failure = load_table(fresh);
    if (!failure.ok()) {
      delete fresh;  // not remembered: the environment may be put right in this process
      return failure;
    }
    table = fresh;
  }
  *acl = table;
  return {};
}

}  // namespace kvlink::ascend
