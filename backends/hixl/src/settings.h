// The provider's options.
#ifndef KVLINK_HIXL_SETTINGS_H
#define KVLINK_HIXL_SETTINGS_H

#include <cstdint>
#include <string>

#include "ascend/options.h"

namespace kvlink::hixl_provider {

constexpr const char *kPathNames[] = {"roce", "hccs", "staged"};
enum Path : uint32_t { kPathRoce = 0, kPathHccs = 1, kPathStaged = 2 };

constexpr uint64_t kUnset = UINT64_MAX;

struct Settings : ascend::CommonOptions {
  std::string engine_host;   // address the vendor's engine serves at; empty: that of advertise_host
  uint64_t engine_port = 0;  // 0: a free one
  uint64_t rdma_traffic_class = kUnset;
  uint64_t rdma_service_level = kUnset;
  uint64_t host_limit = 0;  // bytes of host memory that may be registered; 0: what the driver's version allows
  int32_t device = 0;
};

ascend::Failure parse_settings(const kvl_engine_params &params, Settings *settings);

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_SETTINGS_H
