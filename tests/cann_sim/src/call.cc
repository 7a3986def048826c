// What every vendor call goes through: state of the process, faults, the log, refusals and violations.
#include "call.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "context.h"
#include "errors.h"
#include "log.h"

namespace cann_sim {
namespace {

struct Process {
  std::mutex mutex;
  std::atomic<int> owner{0};  // pid that called aclInit
  std::atomic<bool> finalized{false};
  uint64_t references = 0;
  std::vector<std::function<void()>> at_finalize;
  std::atomic<int64_t> violations{0};
};

Process &process() {
  static Process *const kProcess = new Process;
  return *kProcess;
}

thread_local std::string t_error;
thread_local int t_last_code = 0;

std::atomic<bool> exiting{false};

// This library is never unloaded (-z nodelete), so its handler may stay registered; it runs before any destructor.
__attribute__((constructor)) void watch_exit() {
  ::on_exit([](int, void *) { exiting = true; }, nullptr);
}

std::string format_text(const char *format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

}  // namespace

Call::Call(const char *function, Needs needs) : function_(function) {
  Process &p = process();
  const int owner = p.owner.load();
  if (owner != 0 && owner != ::getpid()) {
    violation(33, "%s in a process forked after aclInit (pid %d, aclInit by %d)", function, ::getpid(), owner);
  }
  if (p.finalized.load()) violation(33, "%s after aclFinalize", function);
  if (flavour().stub) {
    stop_ = true;
    code_ = done(fail(1, kAclStub, "%s: compiling stub mode, the driver is not mounted", function));
    return;
  }
  const Fault fault = faults_active() ? fault_at(function) : Fault{};
  if (fault.kind == Fault::kDelay) std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
  if (fault.kind == Fault::kHang) hang(fault);
  if (fault.kind == Fault::kFail) {
    stop_ = true;
    code_ = done(fail(32, static_cast<int>(fault.value), "%s: fault by request", function));
    return;
  }
  if (needs == Needs::kNothing) return;
  if (p.owner.load() == 0) {
    stop_ = true;
    code_ = done(fail(10, kAclUninitialized, "%s before aclInit", function));
    return;
  }
  if (needs == Needs::kContext && current_context() == nullptr) {
    stop_ = true;
    code_ = done(fail(4, kRtContextNull, "%s: this thread has no current context", function));
  }
}

Call::~Call() {
  if (!logged_) done(0);
}

int Call::done(int code) {
  logged_ = true;
  if (code != 0) t_last_code = code;
  if (logging()) {
    log_event("call",
              "\"fn\":" + json_quote(function_) + ",\"code\":" + std::to_string(static_cast<unsigned>(code)) + notes_);
  }
  return code;
}

Call &Call::note(const char *key, int64_t value) {
  if (logging()) notes_ += std::string(",\"") + key + "\":" + std::to_string(value);
  return *this;
}

Call &Call::note(const char *key, const std::string &value) {
  if (logging()) notes_ += std::string(",\"") + key + "\":" + json_quote(value);
  return *this;
}

int fail(int rule, int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_text(format, arguments);
  va_end(arguments);
  char head[32];
  std::snprintf(head, sizeof(head), "[rule %02d] ", rule);
  set_error_text(head + text);
  t_last_code = code;
  if (logging()) {
    log_event("refused", "\"rule\":" + std::to_string(rule) + ",\"code\":" +
                             std::to_string(static_cast<unsigned>(code)) + ",\"text\":" + json_quote(text));
  }
  return code;
}

void violation(int rule, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_text(format, arguments);
  va_end(arguments);
  ++process().violations;
  log_event("violation", "\"rule\":" + std::to_string(rule) + ",\"text\":" + json_quote(text));
  std::fprintf(stderr, "cann_sim: rule %02d violated: %s\n", rule, text.c_str());
  std::fflush(stderr);
  if (settings().abort_on_violation) std::abort();
}

int64_t violations() { return process().violations.load(); }

void set_error_text(const std::string &text) { t_error = text; }

std::string take_error_text() {
  std::string text;
  text.swap(t_error);
  return text;
}

int last_code(bool clear) {
  const int code = t_last_code;
  if (clear) t_last_code = 0;
  return code;
}

bool process_exiting() { return exiting.load(); }

int acl_initialize() {
  Process &p = process();
  // Peers reach this process's memory by process_vm_readv, which some kernels allow to ancestors only.
  ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  std::lock_guard<std::mutex> lock(p.mutex);
  const bool first = p.references++ == 0;
  p.owner = ::getpid();
  return first ? kAclOk : fail(10, kAclRepeatInitialize, "aclInit was called before");
}

int acl_finalize(uint64_t *remaining) {
  Process &p = process();
  std::vector<std::function<void()>> actions;
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (remaining != nullptr) {
      if (p.references > 0) --p.references;
      *remaining = p.references;
      if (p.references > 0) return kAclOk;
    }
    p.references = 0;
    p.finalized = true;
    actions.swap(p.at_finalize);
  }
  log_event("finalized");
  for (const auto &action : actions) action();
  return kAclOk;
}

void at_finalize(std::function<void()> action) {
  Process &p = process();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.at_finalize.push_back(std::move(action));
}

}  // namespace cann_sim
