#include "hixl_options.h"

#include <cstdlib>
#include <optional>

#include "hccl_json.h"
#include "hixl_status.h"

namespace cann_sim::hixl_sim {
namespace {

[[noreturn]] void refuse(const std::string &key, const std::string &value, const char *expected) {
  throw Refused(26, static_cast<int>(hixl::kParamInvalid),
                "option " + key + " is \"" + value + "\", expected " + expected);
}

std::optional<std::uint64_t> decimal(const std::string &text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  return std::strtoull(text.c_str(), nullptr, 10);
}

std::uint32_t bounded(const std::string &key, const std::string &value, std::uint64_t high, std::uint64_t multiple,
                      const char *expected) {
  const auto number = decimal(value);
  if (!number || *number > high || *number % multiple != 0) refuse(key, value, expected);
  return static_cast<std::uint32_t>(*number);
}

void read_pool(const std::string &key, const std::string &value, Options *out) {
  const std::size_t colon = value.find(':');
  const auto buffers = decimal(value.substr(0, colon));
  const auto size = colon == std::string::npos ? std::nullopt : decimal(value.substr(colon + 1));
  if (!buffers || !size || (*buffers == 0) != (*size == 0) || *buffers * *size > (1 << 20)) {
    refuse(key, value, "N:SizeMB, or 0:0");
  }
  out->pool_buffers = *buffers;
  out->pool_mib = *size;
}

void read_global(const std::string &key, const std::string &value, Options *out) {
  const auto root = hccl::parse_json(value);
  if (!root || root->kind != hccl::Json::Kind::object) refuse(key, value, "a JSON object");
  const hccl::Json *channels = root->find("channel_pool.max_channel");
  if (channels != nullptr) out->max_channels = bounded(key, channels->text, 512, 1, "max_channel up to 512");
  if (root->find("comm_resource_config.protocol_desc") != nullptr) {
    throw Refused(26, static_cast<int>(hixl::kUnsupported), "HIXL's client-server engine is not simulated");
  }
}

void read_local_resource(const std::string &key, const std::string &value) {
  if (value.empty()) return;
  const auto root = hccl::parse_json(value);
  if (!root || root->kind != hccl::Json::Kind::object) refuse(key, value, "a JSON object");
  throw Refused(26, static_cast<int>(hixl::kUnsupported), "LocalCommRes is not simulated");
}

void read_one(const std::string &key, const std::string &value, Options *out) {
  const bool nine = flavour().number >= 900;
  if (key == "BufferPool" || key == "adxl.BufferPool") {
    read_pool(key, value, out);
  } else if (key == "RdmaTrafficClass") {
    out->traffic_class = bounded(key, value, 255, 4, "a multiple of 4 in [0, 255]");
  } else if (key == "RdmaServiceLevel") {
    out->service_level = bounded(key, value, 7, 1, "an integer in [0, 7]");
  } else if (key == "EnableUseFabricMem") {
    if (bounded(key, value, 1, 1, "0 or 1") == 1) {
      throw Refused(26, static_cast<int>(hixl::kUnsupported), "FabricMem is not simulated");
    }
  } else if (key == "GlobalResourceConfig") {
    read_global(key, value, out);
  } else if (nine && key == "AutoConnect") {
    out->auto_connect = bounded(key, value, 1, 1, "0 or 1") == 1;
  } else if (nine && key == "LocalCommRes") {
    read_local_resource(key, value);
  } else {
    refuse(key, value, "a known key");
  }
}

}  // namespace

Options read_options(const std::map<ge::AscendString, ge::AscendString> &given) {
  Options out;
  for (const auto &[key, value] : given) read_one(key.GetString(), value.GetString(), &out);
  return out;
}

}  // namespace cann_sim::hixl_sim
