// What is simulated: the CANN flavour linked into this library, and the settings read once from the environment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#define SIM_API __attribute__((visibility("default")))

namespace cann_sim {

// One per built folder (<build>/lib/cann_sim/<name>); the objects are the same, this and the export lists differ.
struct Flavour {
  const char *name;     // "8.3", "8.5.0", "9.0", "9.1", "devlib"
  const char *release;  // the release a user would name: "8.3.RC1", "8.5.0", "9.0.0", "9.1.0"
  int number;           // 830, 850, 900, 910: compare with this
  bool stub;            // devlib: every call answers 100039
};
SIM_API const Flavour &flavour();

enum class Soc { kA2, kA3, k950 };

struct Settings {
  Soc soc = Soc::kA2;
  std::string soc_name;            // "Ascend910B3", "Ascend910_9382", "Ascend950PR"
  std::vector<int> physical;       // logic id -> physical id
  std::vector<int> visible;        // user id -> logic id (ASCEND_RT_VISIBLE_DEVICES)
  uint64_t hbm_bytes = 0;          // per device
  int host = 0;                    // number of this host; part of its device addresses
  int super_pod = 0;               // A3: the super-pod this host belongs to
  std::string root;                // sysroot that install.py made; its etc/hccn.conf holds the device addresses
  std::string net;                 // processes with the same CANN_SIM_NET reach each other's NICs
  int max_streams = 1984;          // per device
  int delay_min_us = 20;           // each operation takes a random time in [min, max] on its stream
  int delay_max_us = 200;          //
  uint64_t seed = 0;               // of those random times
  int retry_window_ms = 600;       // RDMA retry exhaustion, about 30 s on hardware
  double time_scale = 1.0;         // multiplies the other long times of the vendor (heart-beats)
  uint64_t host_pin_cap = 0;       // largest single aclrtHostRegister; 0 = none
  uint64_t host_mr_cap = 0;        // host bytes the NIC can register in all (HDK: 20 GB or 1 TB)
  std::string hdk;                 // driver version, "25.5.0"
  bool old_kernel = false;         // kernel <= 5.10: aclrtHostRegister takes only memory of aclrtMallocHost
  bool hccs_wired = true;          // false: the A2 pair has no HCCS link (HCCL 5)
  bool tls = false;                // hccn_tool -tls of this process's NICs; must be equal on both ends
  bool init_contention = false;    // communicator inits of two processes at once: the later one is HCCL 7
  bool copy = true;                // false: data copies do nothing (instruction counts)
  bool abort_on_violation = true;  // false: violations are logged and counted
  std::string stopped_events;      // events behind a failed operation in stop mode: complete | error | hang
  std::vector<int> ports_taken;    // NIC ports some other process holds
  std::string log_path;            // event log, JSON lines; empty = none
};
SIM_API const Settings &settings();

SIM_API int device_count();                // user devices
SIM_API int logic_id(int user_device);     // -1 when there is none
SIM_API int physical_id(int user_device);  // -1 when there is none
SIM_API int64_t super_device_id(int user_device);
SIM_API std::string device_ip(int physical_device);  // from hccn.conf; empty when it has none

}  // namespace cann_sim
