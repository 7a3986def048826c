// What the hook provider is told to do: options named hook_*, or environment variables KVLINK_HOOK_* as their defaults.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kvlink/provider.h"

namespace kvlink_hook {

// One injected fault: the n-th call of a function (or every call from the n-th on) answers `status`.
struct Fault {
  std::string function;
  uint64_t nth = 1;
  bool and_later = false;
  kvl_status status = KVL_INTERNAL;
};

// Ways in which the hook breaks the contract itself, to show that the kit notices.
enum class Lie { kNone, kDrop, kShift, kEarly, kTwice };

struct Settings {
  std::vector<Fault> faults;  // hook_fail=submit:3,mem_open:1+:NO_RESOURCE
  uint64_t mask = 0;          // hook_mask=CANCEL,COPY: capabilities to hide
  bool both = false;          // hook_mode=both: show connect mode BOTH, strictly
  std::string rendezvous;     // hook_rendezvous: folder in which two sides of a link meet
  uint64_t alignment = 0;     // hook_alignment, hook_max_ranges, ...: a tighter limit than the provider's; 0 = its own
  uint64_t max_ranges = 0;
  uint64_t max_range_bytes = 0;
  uint32_t max_connects = 0;
  uint32_t depth = 0;       // hook_depth: accepted submits at once; more answer AGAIN. 0 = no limit
  uint32_t delay_ms = 0;    // hook_delay_ms: completions come that much later
  uint32_t defer_ms = 0;    // hook_defer_ms: submits reach the provider that much later
  uint32_t connect_ms = 0;  // hook_connect_ms: link_connect takes that much longer
  // hook_lie: drop = OK and nothing moves; shift = bytes land one unit beside; early = OK before the bytes move;
  // twice = each completion comes twice
  Lie lie = Lie::kNone;
  std::string log;  // hook_log: file for the call log and the contract's violations
};

// The name that differs from hook_ options only in case and prefix: "hook_fail" is KVLINK_HOOK_FAIL.
std::string EnvironmentName(const std::string &option);

// Reads the settings from the environment, then from `options`. Returns false with a message on a wrong one.
bool ReadSettings(const std::map<std::string, std::string> &options, Settings *settings, std::string *problem);

bool ParseStatus(const std::string &text, kvl_status *status);
const char *StatusName(kvl_status status);
bool ParseCapability(const std::string &text, uint64_t *bit);

}  // namespace kvlink_hook
