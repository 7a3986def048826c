#include "faults.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace kvlink_hook {

kvl_status Fail(kvl_error *err, kvl_status status, int64_t vendor_code, const std::string &site,
                const std::string &message) {
  if (err == nullptr) return status;
  const uint32_t room = err->struct_size;
  if (room >= offsetof(kvl_error, status) + sizeof(err->status)) err->status = status;
  if (room >= offsetof(kvl_error, vendor_code) + sizeof(err->vendor_code)) err->vendor_code = vendor_code;
  if (room >= offsetof(kvl_error, site) + sizeof(err->site)) {
    std::snprintf(err->site, sizeof(err->site), "%s", site.c_str());
  }
  if (room >= offsetof(kvl_error, message) + sizeof(err->message)) {
    std::snprintf(err->message, sizeof(err->message), "%s", message.c_str());
  }
  return status;
}

bool Faults::Next(const char *function, kvl_status *status, uint64_t *call) {
  if (settings_ == nullptr || settings_->faults.empty()) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  *call = ++calls_[function];
  for (const Fault &fault : settings_->faults) {
    if (fault.function != function) continue;
    if (*call == fault.nth || (fault.and_later && *call > fault.nth)) {
      *status = fault.status;
      return true;
    }
  }
  return false;
}

bool Faults::Inject(const char *function, kvl_error *err, kvl_status *status) {
  uint64_t call = 0;
  if (!Next(function, status, &call)) return false;
  Fail(err, *status, kInjectedCode, std::string("hook:") + function,
       std::string("injected failure of ") + function + ", call " + std::to_string(call) + ": " + StatusName(*status));
  return true;
}

}  // namespace kvlink_hook
