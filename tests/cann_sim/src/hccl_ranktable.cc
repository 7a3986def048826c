#include "hccl_ranktable.h"

#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "hccl_json.h"
#include "hccl_refused.h"

namespace cann_sim::hccl {
namespace {

constexpr std::size_t kMaxServerId = 64;
constexpr std::size_t kMaxText = 1 << 20;

[[noreturn]] void refuse(const std::string &what, HcclResult code = HCCL_E_PARA) {
  throw Refused(12, code, "EI0014: the rank table is invalid: " + what + ".");
}

// Every scalar of a rank table is a JSON string, numbers too.
std::optional<std::string> text_of(const Json &object, const char *key) {
  const Json *value = object.find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) refuse(std::string("'") + key + "' must be a JSON string");
  return value->text;
}

std::string required(const Json &object, const char *key) {
  const auto text = text_of(object, key);
  if (!text || text->empty()) refuse(std::string("'") + key + "' is missing");
  return *text;
}

std::uint32_t number(const std::string &text, const char *key, std::uint32_t low, std::uint32_t high) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
    refuse(std::string("'") + key + "' is \"" + text + "\", not a decimal number");
  }
  const unsigned long value = std::stoul(text);
  if (value < low || value > high) refuse(std::string("'") + key + "' is out of range: " + text);
  return static_cast<std::uint32_t>(value);
}

const std::vector<Json> &list(const Json &object, const char *key) {
  const Json *value = object.find(key);
  if (value == nullptr || value->kind != Json::Kind::array || value->items.empty()) {
    refuse(std::string("'") + key + "' must be a list with at least one entry");
  }
  return value->items;
}

void check_count(const Json &object, const char *key, std::size_t entries) {
  const auto text = text_of(object, key);
  if (text && number(*text, key, 0, 1000000) != entries) {
    refuse(std::string("'") + key + "' is " + *text + " but " + std::to_string(entries) + " are listed");
  }
}

class Builder {
 public:
  Builder(Family family, bool roce_forced) : family_(family), roce_forced_(roce_forced) {}

  RankTable build(const Json &root) {
    if (required(root, "status") != "completed") refuse("'status' is not \"completed\"");
    table_.version = text_of(root, "version").value_or("1.0");
    if (table_.version != "1.0" && table_.version != "1.2") refuse("'version' is " + table_.version);
    const auto &servers = list(root, "server_list");
    check_count(root, "server_count", servers.size());
    for (const Json &server : servers) add_server(server);
    order_ranks();
    if (table_.version == "1.2") add_pods(root);
    check_device_ips();
    return std::move(table_);
  }

 private:
  void add_server(const Json &server) {
    const std::string id = required(server, "server_id");
    if (id.size() > kMaxServerId) refuse("'server_id' has more than 64 characters");
    if (!servers_.insert(id).second) refuse("'server_id' " + id + " is listed twice");
    text_of(server, "host_ip");
    for (const Json &device : list(server, "device")) add_device(id, device);
  }

  void add_device(const std::string &server_id, const Json &device) {
    Rank rank;
    rank.server_id = server_id;
    rank.device_id = static_cast<int>(number(required(device, "device_id"), "device_id", 0, 65535));
    rank.device_ip = first_address(text_of(device, "device_ip").value_or(""));
    if (const auto port = text_of(device, "device_port")) {
      rank.device_port = static_cast<std::uint16_t>(number(*port, "device_port", 1, 65535));
    }
    for (const char *key : {"host_port", "device_vnic_port", "backup_device_port"}) {
      if (const auto port = text_of(device, key)) number(*port, key, 1, 65535);
    }
    text_of(device, "backup_device_ip");
    rank.super_device_id = text_of(device, "super_device_id").value_or("");
    if (!devices_.emplace(server_id, rank.device_id).second) refuse("a device of " + server_id + " is listed twice");
    const std::uint32_t id = number(required(device, "rank_id"), "rank_id", 0, 65535);
    if (!by_rank_.emplace(id, rank).second)
      refuse("rank_id " + std::to_string(id) + " is listed twice", HCCL_E_UNAVAIL);
  }

  std::string first_address(const std::string &addresses) {
    std::size_t at = 0;
    while (at < addresses.size()) {
      const std::size_t end = std::min(addresses.find(',', at), addresses.size());
      if (!addresses_.insert(addresses.substr(at, end - at)).second) {
        refuse("'device_ip' " + addresses.substr(at, end - at) + " is listed twice");
      }
      at = end + 1;
    }
    return addresses.substr(0, addresses.find(','));
  }

  void order_ranks() {
    for (const auto &[id, rank] : by_rank_) {
      if (id != table_.ranks.size())
        refuse("the rank ids are not 0.." + std::to_string(by_rank_.size() - 1), HCCL_E_UNAVAIL);
      table_.ranks.push_back(rank);
    }
  }

  void add_pods(const Json &root) {
    std::map<std::string, std::string> pod_of;
    std::set<std::string> pods;
    for (const Json &pod : list(root, "super_pod_list")) {
      const std::string id = required(pod, "super_pod_id");
      if (!pods.insert(id).second) refuse("'super_pod_id' " + id + " is listed twice");
      for (const Json &server : list(pod, "server_list")) {
        const std::string server_id = required(server, "server_id");
        if (servers_.count(server_id) == 0) refuse("super_pod_list names the unknown server " + server_id);
        if (!pod_of.emplace(server_id, id).second) refuse("server " + server_id + " is in two super pods");
      }
    }
    std::set<std::pair<std::string, std::string>> super_devices;
    for (Rank &rank : table_.ranks) {
      const auto pod = pod_of.find(rank.server_id);
      if (pod == pod_of.end()) refuse("server " + rank.server_id + " is in no super pod");
      rank.pod_id = pod->second;
      if (!rank.super_device_id.empty() && !super_devices.emplace(rank.pod_id, rank.super_device_id).second) {
        refuse("'super_device_id' " + rank.super_device_id + " is listed twice in one super pod");
      }
    }
  }

  // Every rank whose pair goes over RoCE needs the address of its device's NIC.
  void check_device_ips() const {
    for (std::uint32_t a = 0; a < table_.ranks.size(); ++a) {
      bool needed = roce_forced_;
      for (std::uint32_t b = 0; b < table_.ranks.size() && !needed; ++b) {
        needed = a != b && table_.link(a, b, family_, roce_forced_) == Link::roce;
      }
      if (needed && table_.ranks[a].device_ip.empty())
        refuse("'device_ip' is not set correctly for rank " + std::to_string(a));
    }
  }

  const Family family_;
  const bool roce_forced_;
  RankTable table_;
  std::map<std::uint32_t, Rank> by_rank_;
  std::set<std::string> servers_;
  std::set<std::string> addresses_;
  std::set<std::pair<std::string, int>> devices_;
};

}  // namespace

std::uint64_t fnv1a(const void *bytes, std::size_t size, std::uint64_t seed) {
  std::uint64_t hash = seed;
  for (std::size_t i = 0; i < size; ++i) {
    hash = (hash ^ static_cast<const unsigned char *>(bytes)[i]) * 0x100000001b3ULL;
  }
  return hash;
}

Link RankTable::link(std::uint32_t a, std::uint32_t b, Family family, bool roce_forced) const {
  const bool far = family == Family::a2   ? ranks[a].server_id != ranks[b].server_id
                   : family == Family::a3 ? ranks[a].pod_id != ranks[b].pod_id ||
                                                (version == "1.0" && ranks[a].server_id != ranks[b].server_id)
                                          : true;
  return roce_forced || far ? Link::roce : Link::hccs;
}

RankTable parse_rank_table(const char *text, Family family, bool roce_forced) {
  const std::size_t size = strnlen(text, kMaxText);
  if (size == kMaxText) refuse("it is longer than 1 MiB");
  const auto root = parse_json({text, size});
  if (!root || root->kind != Json::Kind::object) refuse("it is not a JSON object");
  RankTable table = Builder(family, roce_forced).build(*root);
  table.hash = fnv1a(text, size);
  return table;
}

}  // namespace cann_sim::hccl
