// What went wrong, as a value: a status of provider.h, the call that failed, its code, and a sentence for people.
#ifndef KVLINK_HOST_FAILURE_H
#define KVLINK_HOST_FAILURE_H

#include <cstdint>
#include <string>

#include "kvlink/provider.h"

namespace kvlink::host {

struct Failure {
  kvl_status status = KVL_OK;
  int64_t code = 0;
  std::string site;
  std::string message;

  bool ok() const { return status == KVL_OK; }
};

Failure make_failure(kvl_status status, const char *site, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// As above, with errno as the code and its text appended to the message.
Failure errno_failure(kvl_status status, int error, const char *site, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

// Writes `failure` into the caller's memory (which may be null) and returns its status.
kvl_status report(const Failure &failure, kvl_error *err);

// Writes `failure` into a completion.
void report(const Failure &failure, kvl_completion *completion);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_FAILURE_H
