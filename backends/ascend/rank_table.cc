#include "ascend/rank_table.h"

#include <cstdio>

#include "ascend/address.h"

namespace kvlink::ascend {
namespace {

constexpr size_t kMaxServerId = 64;

std::string quoted(const std::string &text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// Every value of the table is a string, numbers too.
std::string field(const char *name, const std::string &value) { return quoted(name) + ":" + quoted(value); }
std::string field(const char *name, int64_t value) { return field(name, std::to_string(value)); }

Failure wrong(size_t rank, const char *what, const std::string &value) {
  return make_failure(KVL_INVALID, "rank table", "rank %zu has %s '%.80s'", rank, what, value.c_str());
}

Failure check(RankTableVersion version, const Rank (&ranks)[2]) {
  for (size_t i = 0; i < 2; ++i) {
    const Rank &rank = ranks[i];
    if (rank.server_id.empty() || rank.server_id.size() > kMaxServerId) {
      return wrong(i, "a server_id that is empty or longer than 64 characters:", rank.server_id);
    }
    if (rank.device_id < 0) return wrong(i, "no physical device id:", std::to_string(rank.device_id));
    if (!rank.device_ip.empty() && !is_ip_address(rank.device_ip)) {
      return wrong(i, "a device_ip that is no address:", rank.device_ip);
    }
    if (version == RankTableVersion::k1_2 && rank.super_pod_id >= 0 && rank.super_device_id < 0) {
      return wrong(i, "no super_device_id, which a super-pod needs:", std::to_string(rank.super_device_id));
    }
  }
  const bool same_server = ranks[0].server_id == ranks[1].server_id;
  if (same_server && ranks[0].device_id == ranks[1].device_id) {
    return make_failure(KVL_INVALID, "rank table",
                        "both sides are NPU %d of server '%.64s': a link needs two different NPUs", ranks[0].device_id,
                        ranks[0].server_id.c_str());
  }
  if (!ranks[0].device_ip.empty() && ranks[0].device_ip == ranks[1].device_ip) {
    return make_failure(KVL_INVALID, "rank table", "both sides have the device_ip %s: each NPU needs its own",
                        ranks[0].device_ip.c_str());
  }
  return {};
}

std::string device_json(RankTableVersion version, const Rank &rank, size_t number) {
  std::string out = "{" + field("device_id", int64_t{rank.device_id});
  if (!rank.device_ip.empty()) out += "," + field("device_ip", rank.device_ip);
  if (rank.device_port != 0) out += "," + field("device_port", int64_t{rank.device_port});
  if (version == RankTableVersion::k1_2 && rank.super_device_id >= 0) {
    out += "," + field("super_device_id", rank.super_device_id);
  }
  return out + "," + field("rank_id", static_cast<int64_t>(number)) + "}";
}

std::string server_json(const Rank &rank, const std::string &devices) {
  std::string out = "{" + field("server_id", rank.server_id);
  if (!rank.host_ip.empty()) out += "," + field("host_ip", rank.host_ip);
  return out + ",\"device\":[" + devices + "]}";
}

std::string pods_json(const Rank (&ranks)[2]) {
  const auto server = [](const Rank &rank) { return "{" + field("server_id", rank.server_id) + "}"; };
  const auto pod = [](const Rank &rank, const std::string &servers) {
    return "{" + field("super_pod_id", rank.super_pod_id < 0 ? 0 : rank.super_pod_id) + ",\"server_list\":[" + servers +
           "]}";
  };
  const bool same_server = ranks[0].server_id == ranks[1].server_id;
  if (same_server) return pod(ranks[0], server(ranks[0]));
  if (ranks[0].super_pod_id == ranks[1].super_pod_id) {
    return pod(ranks[0], server(ranks[0]) + "," + server(ranks[1]));
  }
  return pod(ranks[0], server(ranks[0])) + "," + pod(ranks[1], server(ranks[1]));
}

}  // namespace

Failure make_rank_table(RankTableVersion version, const Rank (&ranks)[2], std::string *json) {
  const Failure failure = check(version, ranks);
  if (!failure.ok()) return failure;
  const bool same_server = ranks[0].server_id == ranks[1].server_id;
  const std::string first = device_json(version, ranks[0], 0), second = device_json(version, ranks[1], 1);
  std::string out = "{" + field("status", "completed");
  out += "," + field("version", version == RankTableVersion::k1_2 ? "1.2" : "1.0");
  out += "," + field("server_count", int64_t{same_server ? 1 : 2}) + ",\"server_list\":[";
  if (same_server) {
    out += server_json(ranks[0], first + "," + second);
  } else {
    out += server_json(ranks[0], first) + "," + server_json(ranks[1], second);
  }
  out += "]";
  if (version == RankTableVersion::k1_2) out += ",\"super_pod_list\":[" + pods_json(ranks) + "]";
  *json = out + "}";
  return {};
}

}  // namespace kvlink::ascend
