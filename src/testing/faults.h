// Counts the calls of each function and says which one has to fail.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "kvlink/provider.h"
#include "settings.h"

namespace kvlink_hook {

// The vendor code of every injected failure, so that a test can tell it from a real one.
constexpr int64_t kInjectedCode = 4937292;  // "KVL" in ASCII

// Fills the caller's error. `err` may be NULL.
kvl_status Fail(kvl_error *err, kvl_status status, int64_t vendor_code, const std::string &site,
                const std::string &message);

class Faults {
 public:
  void Configure(const Settings &settings) { settings_ = &settings; }

  // Counts one call of `function`. Returns true when it has to fail, with the status.
  bool Next(const char *function, kvl_status *status, uint64_t *call);

  // As above, and fills the error.
  bool Inject(const char *function, kvl_error *err, kvl_status *status);

 private:
  const Settings *settings_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, uint64_t> calls_;
};

}  // namespace kvlink_hook
