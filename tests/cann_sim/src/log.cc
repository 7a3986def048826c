// The event log and the counters of live objects.
#include "log.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <mutex>

#include "call.h"

namespace cann_sim {
namespace {

struct Counters {
  std::mutex mutex;
  std::map<std::string, int64_t> live;
};

Counters &counters() {
  static Counters *const kCounters = new Counters;
  return *kCounters;
}

int log_descriptor() {
  static const int kDescriptor = [] {
    const std::string &path = settings().log_path;
    if (path.empty()) return -1;
    const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (descriptor < 0) std::fprintf(stderr, "cann_sim: CANN_SIM_LOG %s can't be opened\n", path.c_str());
    return descriptor;
  }();
  return kDescriptor;
}

}  // namespace

bool logging() { return log_descriptor() >= 0; }

std::string json_quote(const std::string &text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", c);
      quoted += escape;
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

void log_event(const char *event, const std::string &fields) {
  const int descriptor = log_descriptor();
  if (descriptor < 0) return;
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  char head[160];
  std::snprintf(head, sizeof(head), "{\"t_us\":%lld,\"pid\":%d,\"tid\":%ld,\"event\":\"%s\"",
                static_cast<long long>(now.tv_sec) * 1000000 + now.tv_nsec / 1000, ::getpid(), ::syscall(SYS_gettid),
                event);
  std::string line = head;
  if (!fields.empty()) line += "," + fields;
  line += "}\n";
  // One write: O_APPEND keeps the lines of several processes whole.
  if (::write(descriptor, line.data(), line.size()) < 0) std::perror("cann_sim: event log");
}

void count_live(const char *name, int64_t change) {
  Counters &c = counters();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.live[name] += change;
}

int64_t live(const std::string &name) {
  Counters &c = counters();
  std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.live.find(name);
  return found == c.live.end() ? 0 : found->second;
}

std::string live_json() {
  Counters &c = counters();
  std::lock_guard<std::mutex> lock(c.mutex);
  std::string json = "{";
  for (const auto &[name, count] : c.live) {
    if (json.size() > 1) json += ",";
    json += json_quote(name) + ":" + std::to_string(count);
  }
  return json + "}";
}

}  // namespace cann_sim
