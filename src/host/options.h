// The provider's options: parsed once, checked by name and value.
#ifndef KVLINK_HOST_OPTIONS_H
#define KVLINK_HOST_OPTIONS_H

#include <cstdint>
#include <string>

#include "failure.h"

namespace kvlink::host {

// The ways bytes go. The order is that of kvl_provider.path_names and from fast to slow.
enum class Path : uint32_t { kShm = 0, kCma = 1, kTcp = 2, kAuto = 3 };

constexpr const char *kPathNames[] = {"shm", "cma", "tcp"};

struct Options {
  Path path = Path::kAuto;              // kAuto: the fastest that works, per region
  uint32_t streams = 2;                 // TCP connections per peer that this side initiates
  uint32_t threads = 0;                 // extra copy threads; 0 = by the cores this process may use
  uint64_t copy_slice = 512 * 1024;     // bytes copied between two looks at the clock and at cancel
  std::string bind_host = "127.0.0.1";  // where the data listener binds
  std::string advertise_host;           // what peers connect to; empty = bind_host
  std::string tcp_host;                 // both of the above, when data has a network of its own
  uint16_t tcp_port = 0;                // 0 = any free port
  uint32_t peer_timeout_ms = 3000;      // silence after which the kernel gives a data connection up
};

Failure parse_options(const kvl_engine_params &params, Options *options);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_OPTIONS_H
