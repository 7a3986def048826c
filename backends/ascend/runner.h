// Vendor calls that may never return, made on threads that can be given up.
#ifndef KVLINK_ASCEND_RUNNER_H
#define KVLINK_ASCEND_RUNNER_H

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ascend/registry.h"

namespace kvlink::ascend {

class Device;

// Runs each call on a thread of its own with the device's context current. A call that is still inside the vendor's
// library at its deadline is abandoned: the caller goes on, the runner is degraded, the thread is detached and ends
// with the process (it holds no lock of ours and nothing waits for it at exit).
class VendorRunner {
 public:
  // What runs owns what it uses (shared_ptr): its caller may be gone when it returns.
  using Call = std::function<Failure()>;
  // Runs in the abandoned thread if the call does come back: it undoes what succeeded too late.
  using Late = std::function<void(const Failure &result)>;

  explicit VendorRunner(std::shared_ptr<const Device> device);
  ~VendorRunner();  // waits for nobody
  VendorRunner(const VendorRunner &) = delete;
  VendorRunner &operator=(const VendorRunner &) = delete;

  // The call's own result, TIMEOUT when it was given up at the deadline, CANCELLED when the deadline's interrupt_fd
  // became readable first. `name` is the vendor call, for messages.
  Failure run(const char *name, const Deadline &deadline, Call call, Late late = nullptr);

  // The same under the process's InitLock, which is kept until the vendor's function really returns: a call that hangs
  // makes later ones fail at their own deadline.
  Failure run_exclusive(const char *name, const Deadline &deadline, Call call, Late late = nullptr);

  bool degraded() const;
  // ENGINE_DOWN or OK: which call hangs, for how long.
  Failure health() const;
  uint32_t abandoned() const;

 private:
  struct State;
  std::shared_ptr<const Device> device_;
  std::shared_ptr<State> state_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_RUNNER_H
