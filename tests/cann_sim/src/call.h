// The frame of every simulated vendor function: fault injection, the event log, error text, and violations.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "settings.h"

namespace cann_sim {

// ACL codes that the simulator returns; HCCL and HIXL codes stand with their libraries.
enum AclCode : int {
  kAclOk = 0,
  kAclInvalidParam = 100000,
  kAclUninitialized = 100001,
  kAclRepeatInitialize = 100002,
  kAclRepeatFinalize = 100037,
  kAclStub = 100039,
  kRtParamInvalid = 107000,
  kRtInvalidDevice = 107001,
  kRtContextNull = 107002,
  kRtStreamContext = 107003,
  kRtAddrUnaligned = 107008,
  kRtInvalidMemoryType = 107016,
  kRtInvalidHandle = 107017,
  kRtTaskTimeout = 107020,
  kRtStreamAbort = 107023,
  kRtNotSupported = 207000,
  kRtMemoryAllocation = 207001,
  kRtNoEventResource = 207007,
  kRtNoStreamResource = 207008,
  kRtInternalError = 507000,
  kRtStreamSyncTimeout = 507046,
  kRtEventSyncTimeout = 507047,
  kRtLinkError = 507056,
  kRtSuspectRemote = 507057,
  kRtDriverError = 507899,
  kRtHostAlreadyRegistered = 507910,
  kRtHostNotRegistered = 507911,
};

// Needs: what a call presupposes. Every vendor function begins with SIM_CALL.
enum class Needs {
  kNothing,  // may come before aclInit
  kInit,     // after aclInit, else 100001
  kContext,  // and this thread has a live current context, else 107002
};

// One vendor call in progress. The constructor applies faults (fail, delay, hang), flags calls after aclFinalize and
// calls in a forked child, answers the stub profile, and checks what is needed; when stop() is true the function
// returns code() at once. The destructor logs a call that ended without saying so.
class SIM_API Call {
 public:
  explicit Call(const char *function, Needs needs = Needs::kInit);
  ~Call();
  Call(const Call &) = delete;
  Call &operator=(const Call &) = delete;

  bool stop() const { return stop_; }
  int code() const { return code_; }
  // Ends the call: logs it with its code and hands the code back. `return call.done(0);`
  int done(int code);
  // Adds a field to this call's line in the event log.
  Call &note(const char *key, int64_t value);
  Call &note(const char *key, const std::string &value);

 private:
  const char *function_;
  bool stop_ = false;
  int code_ = 0;
  bool logged_ = false;
  std::string notes_;
};

// HCCL functions, whose codes differ (no context = 15), use Needs::kNothing or kInit and ask current_context()
// themselves.
#define SIM_CALL(name, needs)                            \
  ::cann_sim::Call call(name, ::cann_sim::Needs::needs); \
  if (call.stop()) return call.code()

// Refuses: remembers the rule and the text (aclGetRecentErrMsg of this thread), logs, returns `code`.
SIM_API int fail(int rule, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

// What hardware leaves undefined and this simulator does not: prints, logs, and aborts the process (or only counts,
// with CANN_SIM_ON_VIOLATION=log).
SIM_API void violation(int rule, const char *format, ...) __attribute__((format(printf, 2, 3)));
SIM_API int64_t violations();

// The recent error text of this thread; take clears it.
SIM_API void set_error_text(const std::string &text);
SIM_API std::string take_error_text();

// A fault that is not a call of a vendor function. Points: "op" and "op.<name>" (an operation about to run on a
// stream), "peer" (a copy to or from another process), "nic_listen". Counts this occurrence and returns what to do.
struct Fault {
  enum Kind { kNone, kFail, kDelay, kHang, kDrop } kind = kNone;
  int64_t value = 0;   // code or milliseconds
  uint64_t epoch = 0;  // for hang: how many releases there had been
};
SIM_API Fault fault_at(const std::string &point);
SIM_API bool faults_active();  // false: fault_at has nothing to say, and nobody needs to make its argument
// Blocks as the fault kHang says: until its time passed or cann_sim_release() was called.
SIM_API void hang(const Fault &fault);

// Event log: one JSON line. fields is the inside of an object, e.g. "\"rank\":1", or empty.
SIM_API void log_event(const char *event, const std::string &fields = "");
SIM_API std::string json_quote(const std::string &text);

// Live objects, by name ("stream", "event", "context", "allocation", "comm", "hixl", ...); reported by cann_sim_live.
SIM_API void count_live(const char *name, int64_t change);

// Initialisation state of the process (aclInit and its reference count).
SIM_API int acl_initialize();
SIM_API int acl_finalize(uint64_t *remaining);
// Functions to run when ACL is finalized (engines of S2's libraries flag themselves here).
SIM_API void at_finalize(std::function<void()> action);

}  // namespace cann_sim
