#include "hixl_name.h"

#include <arpa/inet.h>

#include <cstring>
#include <fstream>
#include <sstream>
#include <tuple>

#include "settings.h"

namespace cann_sim::hixl_sim {
namespace {

bool is_address(const std::string &text, int family) {
  unsigned char bytes[sizeof(in6_addr)];
  return inet_pton(family, text.c_str(), bytes) == 1;
}

std::optional<int> parse_port(const std::string &text) {
  if (text.empty() || text.size() > 6 || text.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  return std::stoi(text);
}

template <std::size_t Size>
void put(char (&to)[Size], const std::string &text) {
  std::strncpy(to, text.c_str(), Size - 1);
}

// The engine reads /etc/hccn.conf; here that of the installed host, where there is one. Empty: fine for HCCS only.
std::string address_of(int physical_device) {
  if (settings().root.empty()) return device_ip(physical_device);
  std::ifstream conf(settings().root + "/etc/hccn.conf");
  const std::string key = "address_" + std::to_string(physical_device) + "=";
  std::string line;
  while (std::getline(conf, line)) {
    if (line.compare(0, key.size(), key) == 0) return line.substr(key.size());
  }
  return "";
}

std::tuple<std::string, int> order(const Fragment &one) { return {one.server_id, one.device_id}; }

void write_device(std::ostream &out, const Fragment &one, int rank) {
  out << R"({"device_id":")" << one.device_id << R"(",)";
  if (one.device_ip[0] != '\0') out << R"("device_ip":")" << one.device_ip << R"(",)";
  if (one.super_device_id[0] != '\0') out << R"("super_device_id":")" << one.super_device_id << R"(",)";
  out << R"("rank_id":")" << rank << R"("})";
}

void write_servers(std::ostream &out, const Fragment &first, const Fragment &second) {
  const bool together = std::strcmp(first.server_id, second.server_id) == 0;
  out << R"("server_count":")" << (together ? 1 : 2) << R"(","server_list":[{"server_id":")" << first.server_id
      << R"(","device":[)";
  write_device(out, first, 0);
  out << (together ? "," : std::string(R"(]},{"server_id":")") + second.server_id + R"(","device":[)");
  write_device(out, second, 1);
  out << "]}]";
}

void write_pods(std::ostream &out, const Fragment &first, const Fragment &second) {
  const bool one_pod = std::strcmp(first.super_pod_id, second.super_pod_id) == 0;
  const bool together = std::strcmp(first.server_id, second.server_id) == 0;
  out << R"(,"super_pod_list":[{"super_pod_id":")" << first.super_pod_id << R"(","server_list":[{"server_id":")"
      << first.server_id << R"("})";
  if (!one_pod) out << R"(]},{"super_pod_id":")" << second.super_pod_id << R"(","server_list":[)";
  if (!together) out << (one_pod ? "," : "") << R"({"server_id":")" << second.server_id << R"("})";
  out << "]}]";
}

}  // namespace

std::optional<EngineName> parse_engine(const std::string &text) {
  EngineName name;
  std::string port;
  bool has_port = false;
  if (!text.empty() && text[0] == '[') {
    const std::size_t end = text.find(']');
    if (end == std::string::npos) return std::nullopt;
    name.ip = text.substr(1, end - 1);
    if (!is_address(name.ip, AF_INET6)) return std::nullopt;
    has_port = end + 1 < text.size();
    if (has_port && text[end + 1] != ':') return std::nullopt;
    if (has_port) port = text.substr(end + 2);
  } else {
    const std::size_t colon = text.find(':');
    has_port = colon != std::string::npos;
    name.ip = text.substr(0, colon);
    if (!is_address(name.ip, AF_INET)) return std::nullopt;
    if (has_port) port = text.substr(colon + 1);
  }
  if (!has_port) return name;
  const auto number = parse_port(port);
  if (!number) return std::nullopt;
  name.port = *number;
  return name;
}

void Fragment::terminate() {
  server_id[sizeof server_id - 1] = '\0';
  device_ip[sizeof device_ip - 1] = '\0';
  super_device_id[sizeof super_device_id - 1] = '\0';
  super_pod_id[sizeof super_pod_id - 1] = '\0';
}

Fragment local_fragment(const std::string &ip, int user_device) {
  Fragment out;
  put(out.server_id, ip);
  out.device_id = physical_id(user_device);
  put(out.device_ip, address_of(out.device_id));
  if (settings().soc == Soc::kA3) {
    out.super_pod = 1;
    put(out.super_device_id, std::to_string(super_device_id(user_device)));
    put(out.super_pod_id, std::to_string(settings().super_pod));
  }
  return out;
}

std::optional<Merged> merge(const Fragment &own, const Fragment &peer) {
  if (order(own) == order(peer)) return std::nullopt;
  const bool own_first = order(own) < order(peer);
  const Fragment &first = own_first ? own : peer;
  const Fragment &second = own_first ? peer : own;
  const bool pods = first.super_pod != 0 && second.super_pod != 0;
  std::ostringstream out;
  out << R"({"status":"completed","version":")" << (pods ? "1.2" : "1.0") << R"(",)";
  write_servers(out, first, second);
  if (pods) write_pods(out, first, second);
  out << "}";
  return Merged{out.str(), own_first ? 0U : 1U, own_first ? 1U : 0U};
}

}  // namespace cann_sim::hixl_sim
