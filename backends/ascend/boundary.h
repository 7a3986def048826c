// A provider's C boundary: nothing throws across it.
#ifndef KVLINK_ASCEND_BOUNDARY_H
#define KVLINK_ASCEND_BOUNDARY_H

#include <exception>
#include <new>

#include "ascend/library.h"

namespace kvlink::ascend {

inline kvl_status status_of(const Failure &failure, kvl_error *err) {
  return failure.ok() ? static_cast<kvl_status>(KVL_OK) : report(failure, err);
}

// Runs `call`, which returns a kvl_status; an exception becomes one.
template <typename Call>
kvl_status guarded(kvl_error *err, Call call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return report(Failure{KVL_NO_RESOURCE, 0, "allocate", "out of memory"}, err);
  } catch (const std::exception &error) {
    return report(make_failure(KVL_INTERNAL, "provider", "unexpected: %s", error.what()), err);
  } catch (...) {
    return report(Failure{KVL_INTERNAL, 0, "provider", "unexpected exception"}, err);
  }
}

// As guarded, for a call that gives a Failure.
template <typename Call>
kvl_status answered(kvl_error *err, Call call) {
  return guarded(err, [&] { return status_of(call(), err); });
}

template <typename Call>
void guarded_void(Call call) {
  static_cast<void>(guarded(nullptr, [&] {
    call();
    return static_cast<kvl_status>(KVL_OK);
  }));
}

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_BOUNDARY_H
