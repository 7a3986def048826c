#include "options.h"

#include <cstring>
#include <iterator>

#include "suggest.h"

namespace kvlink::host {
namespace {

constexpr const char *kNames[] = {"path",           "streams",  "threads",  "copy_slice",     "bind_host",
                                  "advertise_host", "tcp_host", "tcp_port", "peer_timeout_ms"};

Failure parse_number(const std::string &name, const std::string &value, uint64_t low, uint64_t high, uint64_t *out) {
  unsigned long long number = 0;
  if (!parse_whole(value, low, high, &number)) {
    return make_failure(KVL_INVALID, "engine_open", "option %s is '%.60s'; expected a whole number from %llu to %llu",
                        name.c_str(), value.c_str(), static_cast<unsigned long long>(low),
                        static_cast<unsigned long long>(high));
  }
  *out = number;
  return {};
}

Failure parse_path(const std::string &value, Path *path) {
  for (uint32_t i = 0; i < 3; ++i) {
    if (value == kPathNames[i]) {
      *path = static_cast<Path>(i);
      return {};
    }
  }
  if (value == "auto") {
    *path = Path::kAuto;
    return {};
  }
  return make_failure(KVL_INVALID, "engine_open", "option path is '%.60s'; expected auto, shm, cma or tcp",
                      value.c_str());
}

Failure parse_host(const std::string &name, const std::string &value, std::string *host) {
  if (value.empty() || value.size() > 255) {
    return make_failure(KVL_INVALID, "engine_open", "option %s has %zu characters; expected a host name or an address",
                        name.c_str(), value.size());
  }
  // "[::1]" is how addresses carry IPv6; the resolver wants it bare.
  const bool bracketed = value.size() > 2 && value.front() == '[' && value.back() == ']';
  *host = bracketed ? value.substr(1, value.size() - 2) : value;
  return {};
}

Failure parse_option(const std::string &name, const std::string &value, Options *options) {
  uint64_t number = 0;
  Failure failure;
  if (name == "path") return parse_path(value, &options->path);
  if (name == "bind_host") return parse_host(name, value, &options->bind_host);
  if (name == "advertise_host") return parse_host(name, value, &options->advertise_host);
  if (name == "tcp_host") return parse_host(name, value, &options->tcp_host);
  if (name == "streams") {
    failure = parse_number(name, value, 1, 16, &number);
    options->streams = static_cast<uint32_t>(number);
  } else if (name == "threads") {
    failure = parse_number(name, value, 0, 64, &number);
    options->threads = static_cast<uint32_t>(number);
  } else if (name == "copy_slice") {
    failure = parse_number(name, value, 4096, uint64_t{64} << 20, &number);
    options->copy_slice = number;
  } else if (name == "tcp_port") {
    failure = parse_number(name, value, 0, 65535, &number);
    options->tcp_port = static_cast<uint16_t>(number);
  } else if (name == "peer_timeout_ms") {
    failure = parse_number(name, value, 1, 86400000, &number);
    options->peer_timeout_ms = static_cast<uint32_t>(number);
  } else {
    failure = make_failure(KVL_INVALID, "engine_open", "unknown option '%.60s'; did you mean '%s'?", name.c_str(),
                           nearest_name(name, {std::begin(kNames), std::end(kNames)}).c_str());
  }
  return failure;
}

}  // namespace

Failure parse_options(const kvl_engine_params &params, Options *options) {
  for (uint32_t i = 0; i < params.option_count; ++i) {
    const kvl_option &option = params.options[i];
    if (option.name == nullptr || option.value == nullptr) {
      return make_failure(KVL_INVALID, "engine_open", "option %u has a null name or value", i);
    }
    const Failure failure = parse_option(option.name, option.value, options);
    if (!failure.ok()) return failure;
  }
  if (!options->tcp_host.empty()) options->bind_host = options->advertise_host = options->tcp_host;
  if (options->advertise_host.empty()) {
    const bool wildcard = options->bind_host == "0.0.0.0" || options->bind_host == "::";
    options->advertise_host = wildcard ? "127.0.0.1" : options->bind_host;
  }
  if (params.device != nullptr && params.device[0] != '\0' && std::strcmp(params.device, "cpu") != 0) {
    return make_failure(KVL_INVALID, "engine_open", "device is '%.40s'; the host provider serves 'cpu' only",
                        params.device);
  }
  return {};
}

}  // namespace kvlink::host
