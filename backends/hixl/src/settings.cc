#include "settings.h"

#include <netdb.h>

#include "ascend/device.h"
#include "host/socket.h"

namespace kvlink::hixl_provider {
namespace {

using ascend::Failure;
using ascend::make_failure;

// The vendor takes addresses only, and uses the one given as the server's identity.
Failure numeric_host(const std::string &host, std::string *out) {
  std::vector<host::Address> addresses;
  const Failure failure = host::resolve(host, 0, false, &addresses);
  if (!failure.ok()) return failure;
  for (const host::Address &address : addresses) {
    char text[NI_MAXHOST];
    const auto *storage = reinterpret_cast<const sockaddr *>(&address.storage);
    if (getnameinfo(storage, address.length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0) {
      *out = text;
      return {};
    }
  }
  return make_failure(KVL_INVALID, "getnameinfo", "'%s' has no IPv4 or IPv6 address: set option engine_host to one",
                      host.c_str());
}

}  // namespace

Failure parse_settings(const kvl_engine_params &params, Settings *settings) {
  ascend::OptionTable table;
  settings->declare(&table);
  table.host("engine_host", &settings->engine_host);
  table.number("engine_port", 0, 65535, &settings->engine_port);
  table.number("rdma_traffic_class", 0, 255, &settings->rdma_traffic_class);
  table.number("rdma_service_level", 0, 7, &settings->rdma_service_level);
  table.number("host_limit", 0, UINT64_MAX - 1, &settings->host_limit);
  Failure failure = table.parse(params);
  if (!failure.ok()) return failure;
  if (settings->rdma_traffic_class != kUnset && settings->rdma_traffic_class % 4 != 0) {
    return make_failure(KVL_INVALID, "engine_open",
                        "option rdma_traffic_class is %llu; the vendor takes multiples of 4 from 0 to 252",
                        static_cast<unsigned long long>(settings->rdma_traffic_class));
  }
  if (!settings->device_ip.empty() || !settings->server_id.empty()) {
    return make_failure(KVL_INVALID, "engine_open",
                        "option %s is '%s', and HIXL takes none: it looks the address up itself (/etc/hccn.conf, "
                        "hccn_tool) and uses engine_host as the server's identity",
                        settings->device_ip.empty() ? "server_id" : "device_ip",
                        (settings->device_ip.empty() ? settings->server_id : settings->device_ip).c_str());
  }
  failure = settings->complete();
  if (!failure.ok()) return failure;
  failure = ascend::parse_device(params.device, &settings->device);
  if (!failure.ok()) return failure;
  const std::string host = settings->engine_host.empty() ? settings->advertise_host : settings->engine_host;
  return numeric_host(host, &settings->engine_host);
}

}  // namespace kvlink::hixl_provider
