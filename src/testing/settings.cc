#include "settings.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <limits>
#include <sstream>

namespace kvlink_hook {
namespace {

constexpr const char *kStatusNames[] = {
    "OK",          "DONE",   "AGAIN",   "INVALID",   "STATE",    "BUSY",   "UNSUPPORTED", "UNAVAILABLE",
    "NO_RESOURCE", "DENIED", "TIMEOUT", "CANCELLED", "INTERNAL", "REMOTE", "LINK_DOWN",   "ENGINE_DOWN"};
constexpr const char *kCapabilityNames[] = {"PUT",        "GET",    "ACCEPTOR_SUBMIT", "LATE_MEMORY",
                                            "ALLOCATE",   "COPY",   "CANCEL",          "INTERRUPT",
                                            "LINK_CHECK", "STREAM", "STATISTICS",      "BUSY_POLL"};
constexpr const char *kFaultFunctions[] = {"probe",        "engine_open", "engine_query", "mem_alloc", "mem_open",
                                           "mem_close",    "mem_export",  "mem_copy",     "link_open", "link_describe",
                                           "link_connect", "rmem_open",   "submit",       "poll",      "cancel",
                                           "link_check",   "stats"};

std::vector<std::string> Split(const std::string &text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

bool ParseNumber(const std::string &text, uint64_t limit, uint64_t *number) {
  if (text.empty() || !std::isdigit(static_cast<unsigned char>(text[0]))) return false;
  errno = 0;
  char *end = nullptr;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  if (errno != 0 || *end != '\0' || value > limit) return false;
  *number = value;
  return true;
}

bool ParseFault(const std::string &text, Fault *fault, std::string *problem) {
  const std::vector<std::string> parts = Split(text, ':');
  if (parts.empty() || parts.size() > 3) {
    *problem = "hook_fail: '" + text + "' is not FUNCTION:N[+][:STATUS]";
    return false;
  }
  fault->function = parts[0];
  if (std::find(std::begin(kFaultFunctions), std::end(kFaultFunctions), parts[0]) == std::end(kFaultFunctions)) {
    *problem = "hook_fail: '" + parts[0] + "' is no function that can be made to fail";
    return false;
  }
  if (parts.size() > 1) {
    std::string count = parts[1];
    if (!count.empty() && count.back() == '+') {
      fault->and_later = true;
      count.pop_back();
    }
    if (!ParseNumber(count, std::numeric_limits<uint64_t>::max(), &fault->nth) || fault->nth == 0) {
      *problem = "hook_fail: '" + parts[1] + "' is not a call number from 1 on";
      return false;
    }
  }
  if (parts.size() > 2 && !ParseStatus(parts[2], &fault->status)) {
    *problem = "hook_fail: '" + parts[2] + "' is no status";
    return false;
  }
  return true;
}

bool ParseLie(const std::string &text, Lie *lie) {
  const std::map<std::string, Lie> lies = {
      {"", Lie::kNone}, {"drop", Lie::kDrop}, {"shift", Lie::kShift}, {"early", Lie::kEarly}, {"twice", Lie::kTwice}};
  const auto found = lies.find(text);
  if (found != lies.end()) *lie = found->second;
  return found != lies.end();
}

bool Apply(const std::string &name, const std::string &value, Settings *settings, std::string *problem) {
  uint64_t number = 0;
  const auto u32 = [&](uint32_t *field) {
    if (!ParseNumber(value, std::numeric_limits<uint32_t>::max(), &number)) return false;
    *field = static_cast<uint32_t>(number);
    return true;
  };
  const auto u64 = [&](uint64_t *field) { return ParseNumber(value, std::numeric_limits<uint64_t>::max(), field); };
  bool good = true;
  if (name == "hook_fail") {
    settings->faults.clear();
    for (const std::string &part : Split(value, ',')) {
      Fault fault;
      if (!ParseFault(part, &fault, problem)) return false;
      settings->faults.push_back(fault);
    }
  } else if (name == "hook_mask") {
    settings->mask = 0;
    for (const std::string &part : Split(value, ',')) {
      uint64_t bit = 0;
      if (!ParseCapability(part, &bit)) {
        *problem = "hook_mask: '" + part + "' is no capability";
        return false;
      }
      settings->mask |= bit;
    }
  } else if (name == "hook_mode") {
    good = value == "both" || value == "provider" || value.empty();
    settings->both = value == "both";
  } else if (name == "hook_lie") {
    good = ParseLie(value, &settings->lie);
  } else if (name == "hook_rendezvous") {
    settings->rendezvous = value;
  } else if (name == "hook_log") {
    settings->log = value;
  } else if (name == "hook_alignment") {
    good = u64(&settings->alignment);
  } else if (name == "hook_max_ranges") {
    good = u64(&settings->max_ranges);
  } else if (name == "hook_max_range_bytes") {
    good = u64(&settings->max_range_bytes);
  } else if (name == "hook_max_connects") {
    good = u32(&settings->max_connects);
  } else if (name == "hook_depth") {
    good = u32(&settings->depth);
  } else if (name == "hook_delay_ms") {
    good = u32(&settings->delay_ms);
  } else if (name == "hook_defer_ms") {
    good = u32(&settings->defer_ms);
  } else if (name == "hook_connect_ms") {
    good = u32(&settings->connect_ms);
  } else {
    *problem = "the hook has no option '" + name + "'";
    return false;
  }
  if (!good) *problem = name + ": '" + value + "' is not a valid value";
  return good;
}

constexpr const char *kOptions[] = {"hook_fail",
                                    "hook_mask",
                                    "hook_mode",
                                    "hook_rendezvous",
                                    "hook_log",
                                    "hook_lie",
                                    "hook_alignment",
                                    "hook_depth",
                                    "hook_delay_ms",
                                    "hook_defer_ms",
                                    "hook_connect_ms",
                                    "hook_max_ranges",
                                    "hook_max_range_bytes",
                                    "hook_max_connects"};

}  // namespace

std::string EnvironmentName(const std::string &option) {
  std::string name = "KVLINK_" + option;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return name;
}

bool ReadSettings(const std::map<std::string, std::string> &options, Settings *settings, std::string *problem) {
  for (const char *name : kOptions) {
    const char *value = std::getenv(EnvironmentName(name).c_str());
    if (value != nullptr && !Apply(name, value, settings, problem)) return false;
  }
  for (const auto &option : options) {
    if (!Apply(option.first, option.second, settings, problem)) return false;
  }
  if (settings->rendezvous.empty()) {
    const char *folder = std::getenv("TMPDIR");
    settings->rendezvous = folder != nullptr && *folder != '\0' ? folder : "/tmp";
  }
  return true;
}

bool ParseStatus(const std::string &text, kvl_status *status) {
  for (size_t index = 0; index < std::size(kStatusNames); ++index) {
    if (text == kStatusNames[index]) {
      *status = static_cast<kvl_status>(index);
      return true;
    }
  }
  return false;
}

const char *StatusName(kvl_status status) {
  const auto index = static_cast<size_t>(status);
  return status >= 0 && index < std::size(kStatusNames) ? kStatusNames[index] : "?";
}

bool ParseCapability(const std::string &text, uint64_t *bit) {
  for (size_t index = 0; index < std::size(kCapabilityNames); ++index) {
    if (text == kCapabilityNames[index]) {
      *bit = uint64_t{1} << index;
      return true;
    }
  }
  return false;
}

}  // namespace kvlink_hook
