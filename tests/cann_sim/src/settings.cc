// Reads the CANN_SIM_* environment; a value that makes no sense stops the process, since a test would prove nothing.
#include "settings.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace cann_sim {
namespace {

[[noreturn]] void refuse(const char *name, const std::string &value, const char *expected) {
  std::fprintf(stderr, "cann_sim: %s is '%s'; expected %s\n", name, value.c_str(), expected);
  std::fflush(stderr);
  std::_Exit(97);
}

std::string text(const char *name, const char *fallback) {
  const char *value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

int64_t integer(const char *name, int64_t fallback, int64_t low, int64_t high) {
  const std::string value = text(name, "");
  if (value.empty()) return fallback;
  char *end = nullptr;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  if (*end != '\0' || number < low || number > high) refuse(name, value, "a whole number in range");
  return number;
}

// "1,2,3"; stops at the first word that is no number, as the vendor does for ASCEND_RT_VISIBLE_DEVICES.
std::vector<int> integers(const std::string &list) {
  std::vector<int> numbers;
  const char *at = list.c_str();
  while (*at != '\0') {
    char *end = nullptr;
    const long number = std::strtol(at, &end, 10);
    if (end == at) break;
    numbers.push_back(static_cast<int>(number));
    if (*end != ',') break;
    at = end + 1;
  }
  return numbers;
}

void read_soc(Settings *s) {
  const std::string soc = text("CANN_SIM_SOC", "A2");
  if (soc == "A2") {
    s->soc_name = "Ascend910B3";
  } else if (soc == "A3") {
    s->soc_name = "Ascend910_9382";
  } else if (soc == "950") {
    s->soc_name = "Ascend950PR_9589";
  } else {
    s->soc_name = soc;
  }
  if (s->soc_name.rfind("Ascend910B", 0) == 0) {
    s->soc = Soc::kA2;
  } else if (s->soc_name.rfind("Ascend910_93", 0) == 0) {
    s->soc = Soc::kA3;
  } else if (s->soc_name.rfind("Ascend950", 0) == 0) {
    s->soc = Soc::k950;
  } else {
    refuse("CANN_SIM_SOC", soc, "A2, A3, 950 or a name such as Ascend910B3");
  }
}

void read_devices(Settings *s) {
  const int devices = static_cast<int>(integer("CANN_SIM_DEVICES", 1, 0, 64));
  s->physical = integers(text("CANN_SIM_PHYSICAL_IDS", ""));
  if (s->physical.empty()) {
    for (int i = 0; i < devices; ++i) s->physical.push_back(i);
  } else if (static_cast<int>(s->physical.size()) != devices) {
    refuse("CANN_SIM_PHYSICAL_IDS", text("CANN_SIM_PHYSICAL_IDS", ""), "as many ids as CANN_SIM_DEVICES");
  }
  const char *visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (visible == nullptr) {
    for (int i = 0; i < devices; ++i) s->visible.push_back(i);
    return;
  }
  for (int logic : integers(visible)) {
    if (logic < 0 || logic >= devices) break;
    s->visible.push_back(logic);
  }
}

void read_delay(Settings *s) {
  const std::string delay = text("CANN_SIM_DELAY_US", "20:200");
  const int fields = std::sscanf(delay.c_str(), "%d:%d", &s->delay_min_us, &s->delay_max_us);
  if (fields == 1) s->delay_max_us = s->delay_min_us;
  if (fields < 1 || s->delay_min_us < 0 || s->delay_max_us < s->delay_min_us) {
    refuse("CANN_SIM_DELAY_US", delay, "min:max in microseconds");
  }
}

void read_host_caps(Settings *s) {
  s->hdk = text("CANN_SIM_HDK", "25.5.0");
  int major = 0;
  int minor = 0;
  if (std::sscanf(s->hdk.c_str(), "%d.%d", &major, &minor) != 2) refuse("CANN_SIM_HDK", s->hdk, "a version, 25.5.0");
  const bool large = major > 25 || (major == 25 && minor >= 5);
  const int64_t mib = integer("CANN_SIM_HOST_MR_MIB", large ? int64_t{1} << 20 : 20 * 1024, 0, int64_t{1} << 30);
  s->host_mr_cap = static_cast<uint64_t>(mib) << 20;
  s->host_pin_cap = static_cast<uint64_t>(integer("CANN_SIM_HOST_PIN_MIB", 0, 0, int64_t{1} << 30)) << 20;
}

Settings read() {
  Settings s;
  read_soc(&s);
  read_devices(&s);
  read_delay(&s);
  read_host_caps(&s);
  s.hbm_bytes = static_cast<uint64_t>(integer("CANN_SIM_HBM_MIB", 4096, 1, int64_t{1} << 20)) << 20;
  s.host = static_cast<int>(integer("CANN_SIM_HOST", 0, 0, 99));
  s.super_pod = static_cast<int>(integer("CANN_SIM_SUPER_POD", 0, 0, 1 << 20));
  s.root = text("CANN_SIM_ROOT", "");
  s.net = text("CANN_SIM_NET", "default");
  s.max_streams = static_cast<int>(integer("CANN_SIM_MAX_STREAMS", 1984, 0, 1 << 20));
  s.seed = static_cast<uint64_t>(integer("CANN_SIM_SEED", 1, 0, INT64_MAX));
  s.retry_window_ms = static_cast<int>(integer("CANN_SIM_RETRY_MS", 600, 0, 3600000));
  s.time_scale = std::atof(text("CANN_SIM_TIME_SCALE", "1").c_str());
  if (s.time_scale <= 0) refuse("CANN_SIM_TIME_SCALE", text("CANN_SIM_TIME_SCALE", "1"), "a number above 0");
  s.old_kernel = integer("CANN_SIM_OLD_KERNEL", 0, 0, 1) == 1;
  s.hccs_wired = integer("CANN_SIM_HCCS_WIRED", 1, 0, 1) == 1;
  s.tls = integer("CANN_SIM_TLS", 0, 0, 1) == 1;
  s.init_contention = integer("CANN_SIM_INIT_CONTENTION", 0, 0, 1) == 1;
  s.copy = text("CANN_SIM_COPY", "on") != "off";
  const std::string on_violation = text("CANN_SIM_ON_VIOLATION", "abort");
  if (on_violation != "abort" && on_violation != "log") refuse("CANN_SIM_ON_VIOLATION", on_violation, "abort or log");
  s.abort_on_violation = on_violation == "abort";
  s.stopped_events = text("CANN_SIM_STOPPED_EVENTS", "complete");
  if (s.stopped_events != "complete" && s.stopped_events != "error" && s.stopped_events != "hang") {
    refuse("CANN_SIM_STOPPED_EVENTS", s.stopped_events, "complete, error or hang");
  }
  s.ports_taken = integers(text("CANN_SIM_PORTS_TAKEN", ""));
  s.log_path = text("CANN_SIM_LOG", "");
  return s;
}

}  // namespace

const Settings &settings() {
  static const Settings *const kSettings = new Settings(read());  // lives as long as detached threads may look
  return *kSettings;
}

int device_count() { return static_cast<int>(settings().visible.size()); }

int logic_id(int user_device) {
  if (user_device < 0 || user_device >= device_count()) return -1;
  return settings().visible[static_cast<size_t>(user_device)];
}

int physical_id(int user_device) {
  const int logic = logic_id(user_device);
  return logic < 0 ? -1 : settings().physical[static_cast<size_t>(logic)];
}

int64_t super_device_id(int user_device) {
  const int physical = physical_id(user_device);
  return physical < 0 ? -1 : (int64_t{1} << 26) + settings().host * 0x40000 + physical * 0x10001;
}

std::string device_ip(int physical_device) {
  if (!settings().root.empty()) {
    const std::string key = "address_" + std::to_string(physical_device) + "=";
    std::ifstream conf(settings().root + "/etc/hccn.conf");
    for (std::string line; std::getline(conf, line);) {
      if (line.rfind(key, 0) == 0) return line.substr(key.size());
    }
    return "";
  }
  return "192.168." + std::to_string(100 + settings().host) + "." + std::to_string(100 + physical_device);
}

}  // namespace cann_sim
