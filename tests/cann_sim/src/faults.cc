// CANN_SIM_FAULTS: which occurrence of which point gets which fault.
#include "faults.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "call.h"

namespace cann_sim {
namespace {

struct Entry {
  std::string point;
  int64_t first = 1;
  int64_t last = INT64_MAX;
  Fault fault;
  bool crash = false;
};

struct Faults {
  std::mutex mutex;
  std::condition_variable released;
  uint64_t releases = 0;
  std::vector<Entry> entries;
  std::map<std::string, int64_t> counts;
  std::atomic<bool> any{false};
};

Faults &faults() {
  static Faults *const kFaults = new Faults;
  return *kFaults;
}

[[noreturn]] void refuse(const std::string &entry) {
  std::fprintf(stderr, "cann_sim: CANN_SIM_FAULTS entry '%s' is not POINT[@N|@A-B|@A-]=ACTION[:VALUE]\n",
               entry.c_str());
  std::fflush(stderr);
  std::_Exit(97);
}

int64_t number(const std::string &digits, const std::string &entry) {
  if (digits.empty()) refuse(entry);
  char *end = nullptr;
  const int64_t value = std::strtoll(digits.c_str(), &end, 10);
  if (*end != '\0') refuse(entry);
  return value;
}

Entry parse(const std::string &entry) {
  Entry parsed;
  const size_t equals = entry.rfind('=');
  if (equals == std::string::npos || equals == 0) refuse(entry);
  std::string point = entry.substr(0, equals);
  const size_t at = point.find('@');
  if (at != std::string::npos) {
    const std::string when = point.substr(at + 1);
    point.resize(at);
    const size_t dash = when.find('-');
    parsed.first = number(when.substr(0, dash), entry);
    if (dash == std::string::npos) {
      parsed.last = parsed.first;
    } else if (dash + 1 < when.size()) {
      parsed.last = number(when.substr(dash + 1), entry);
    }
  }
  parsed.point = point;
  const std::string action = entry.substr(equals + 1);
  const size_t colon = action.find(':');
  const std::string verb = action.substr(0, colon);
  const std::string value = colon == std::string::npos ? "" : action.substr(colon + 1);
  if (verb == "fail") {
    parsed.fault = {Fault::kFail, number(value, entry), 0};
  } else if (verb == "delay") {
    parsed.fault = {Fault::kDelay, number(value, entry), 0};
  } else if (verb == "hang") {
    parsed.fault = {Fault::kHang, value.empty() ? INT64_MAX : number(value, entry), 0};
  } else if (verb == "drop" && value.empty()) {
    parsed.fault = {Fault::kDrop, 0, 0};
  } else if (verb == "crash" && value.empty()) {
    parsed.crash = true;
  } else {
    refuse(entry);
  }
  return parsed;
}

std::vector<Entry> parse_all(const std::string &spec) {
  std::vector<Entry> entries;
  size_t from = 0;
  while (from <= spec.size()) {
    const size_t to = std::min(spec.find(';', from), spec.size());
    std::string entry = spec.substr(from, to - from);
    while (!entry.empty() && std::isspace(static_cast<unsigned char>(entry.back())) != 0) entry.pop_back();
    while (!entry.empty() && std::isspace(static_cast<unsigned char>(entry.front())) != 0) entry.erase(0, 1);
    if (!entry.empty()) entries.push_back(parse(entry));
    from = to + 1;
  }
  return entries;
}

void install(Faults &f, const std::string &spec) {
  std::vector<Entry> entries = parse_all(spec);
  std::lock_guard<std::mutex> lock(f.mutex);
  f.entries = std::move(entries);
  f.counts.clear();
  f.any = !f.entries.empty();
}

void load_environment() {
  static std::once_flag once;
  std::call_once(once, [] {
    const char *spec = std::getenv("CANN_SIM_FAULTS");
    if (spec != nullptr) install(faults(), spec);
  });
}

}  // namespace

void set_faults(const std::string &spec) {
  load_environment();  // so that it cannot come later and replace these
  install(faults(), spec);
}

void release_hangs() {
  Faults &f = faults();
  std::lock_guard<std::mutex> lock(f.mutex);
  ++f.releases;
  // Also those that nobody has come to yet, so that a release cannot be too early.
  const auto hangs = [](const Entry &entry) { return entry.fault.kind == Fault::kHang; };
  f.entries.erase(std::remove_if(f.entries.begin(), f.entries.end(), hangs), f.entries.end());
  f.released.notify_all();
}

uint64_t hang_releases() {
  Faults &f = faults();
  std::lock_guard<std::mutex> lock(f.mutex);
  return f.releases;
}

bool faults_active() {
  load_environment();
  return faults().any.load(std::memory_order_relaxed);
}

Fault fault_at(const std::string &point) {
  if (!faults_active()) return {};
  Faults &f = faults();
  Fault fault;
  bool crash = false;
  {
    std::lock_guard<std::mutex> lock(f.mutex);
    int64_t count = 0;
    for (const Entry &entry : f.entries) {
      if (entry.point != point) continue;
      if (count == 0) count = ++f.counts[point];
      if (count < entry.first || count > entry.last) continue;
      fault = entry.fault;
      fault.epoch = f.releases;
      crash = entry.crash;
      break;
    }
  }
  if (crash) {
    log_event("fault", "\"point\":" + json_quote(point) + ",\"action\":\"crash\"");
    ::kill(::getpid(), SIGKILL);
  }
  if (fault.kind != Fault::kNone) {
    static const char *const kNames[] = {"none", "fail", "delay", "hang", "drop"};
    log_event("fault", "\"point\":" + json_quote(point) + ",\"action\":\"" + kNames[fault.kind] +
                           "\",\"value\":" + std::to_string(fault.value));
  }
  return fault;
}

void hang(const Fault &fault) {
  Faults &f = faults();
  std::unique_lock<std::mutex> lock(f.mutex);
  const auto over = [&] { return f.releases != fault.epoch; };
  if (fault.value == INT64_MAX) {
    f.released.wait(lock, over);
  } else {
    f.released.wait_for(lock, std::chrono::milliseconds(fault.value), over);
  }
}

}  // namespace cann_sim
