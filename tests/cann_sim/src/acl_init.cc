// libascendcl.so: initialisation, versions and error text.
#include <cstdio>
#include <cstring>
#include <string>

#include "acl_abi.h"
#include "errors.h"
#include "sim.h"

namespace {

// Runs at dlclose, which is wrong (the vendor's libraries own threads and singletons), and at the end of the process.
__attribute__((destructor)) void unloaded() {
  if (!cann_sim::process_exiting()) cann_sim::violation(33, "dlclose of libascendcl.so");
}

// What share/info/runtime/version.info says: before 8.5 an internal number, not the release.
const char *runtime_version() {
  return cann_sim::flavour().number < 850 ? "7.8.T30.0.B231" : cann_sim::flavour().release;
}

// hcomm's lags behind the release in 8.5.0 and in 9.1.
std::string package_version(const std::string &package) {
  const int number = cann_sim::flavour().number;
  if (package == "hcomm" || package == "hixl" || package == "metadef") {
    if (number == 850) return "8.5.0-beta.1";
    if (number == 910) return "9.0.0";
  }
  return runtime_version();
}

}  // namespace

ACL_EXPORT int aclInit(const char *) {
  SIM_CALL("aclInit", kNothing);
  return call.done(cann_sim::acl_initialize());
}

ACL_EXPORT int aclFinalize() {
  SIM_CALL("aclFinalize", kInit);
  return call.done(cann_sim::acl_finalize(nullptr));
}

ACL_EXPORT int aclFinalizeReference(uint64_t *references) {
  SIM_CALL("aclFinalizeReference", kInit);
  if (references == nullptr) return call.done(cann_sim::fail(10, cann_sim::kAclInvalidParam, "refCount is null"));
  return call.done(cann_sim::acl_finalize(references));
}

ACL_EXPORT const char *aclGetRecentErrMsg() {
  static thread_local std::string text;
  text = cann_sim::take_error_text();
  return text.empty() ? nullptr : text.c_str();
}

ACL_EXPORT int aclrtGetLastError(int) { return cann_sim::last_code(true); }

ACL_EXPORT int aclrtPeekAtLastError(int) { return cann_sim::last_code(false); }

ACL_EXPORT int aclsysGetCANNVersion(int package, cann_sim::aclCANNPackageVersion *version) {
  SIM_CALL("aclsysGetCANNVersion", kNothing);
  if (version == nullptr || package < 0 || package > 7) {
    return call.done(cann_sim::fail(2, cann_sim::kAclInvalidParam, "aclsysGetCANNVersion(%d)", package));
  }
  std::memset(version, 0, sizeof(*version));
  std::snprintf(version->version, sizeof(version->version), "%s", runtime_version());
  int fields[3] = {0, 0, 0};
  if (std::sscanf(runtime_version(), "%d.%d.%d", &fields[0], &fields[1], &fields[2]) >= 2) {
    std::snprintf(version->majorVersion, sizeof(version->majorVersion), "%d", fields[0]);
    std::snprintf(version->minorVersion, sizeof(version->minorVersion), "%d", fields[1]);
    std::snprintf(version->releaseVersion, sizeof(version->releaseVersion), "%d", fields[2]);
  }
  return call.done(0);
}

ACL_EXPORT int aclsysGetVersionStr(char *package, char *text) {
  SIM_CALL("aclsysGetVersionStr", kNothing);
  if (package == nullptr || text == nullptr) {
    return call.done(cann_sim::fail(2, cann_sim::kAclInvalidParam, "aclsysGetVersionStr: null pointer"));
  }
  std::strcpy(text, package_version(package).c_str());  // NOLINT: the vendor's interface has no length
  return call.done(0);
}

ACL_EXPORT int aclsysGetVersionNum(char *package, int32_t *number) {
  SIM_CALL("aclsysGetVersionNum", kNothing);
  int major = 0;
  int minor = 0;
  int patch = 0;
  if (package == nullptr || number == nullptr ||
      std::sscanf(package_version(package).c_str(), "%d.%d.%d", &major, &minor, &patch) != 3) {
    return call.done(cann_sim::fail(2, cann_sim::kAclInvalidParam, "aclsysGetVersionNum: null pointer or no version"));
  }
  const bool beta = package_version(package).find("-beta.") != std::string::npos;
  *number = major * 10000000 + minor * 100000 + patch * 1000 - (beta ? 199 : 0);
  return call.done(0);
}
