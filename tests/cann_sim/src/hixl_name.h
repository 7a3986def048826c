// Engine names ("ip:port", "ip", "[v6]:port") and the JSON rank table HIXL builds from its own and the peer's fragment.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace cann_sim::hixl_sim {

struct EngineName {
  std::string ip;
  int port = 0;  // 0: a client only
};
// nullopt when the text is no such name. A port above 65535 passes, as in the vendor's engine, and wraps at the socket.
std::optional<EngineName> parse_engine(const std::string &text);

// What a side tells the other about its device: plain bytes on the control connection.
struct Fragment {
  char server_id[64] = {};
  char device_ip[64] = {};
  char super_device_id[24] = {};
  char super_pod_id[24] = {};
  std::int32_t device_id = 0;
  std::uint32_t super_pod = 0;  // 1: rank table version 1.2

  // Texts received from the peer end somewhere.
  void terminate();
};
Fragment local_fragment(const std::string &ip, int user_device);

struct Merged {
  std::string json;
  std::uint32_t own_rank = 0;
  std::uint32_t peer_rank = 1;
};
// nullopt when both are the same device.
std::optional<Merged> merge(const Fragment &own, const Fragment &peer);

}  // namespace cann_sim::hixl_sim
