// The options of Hixl::Initialize (facts 4.4).
#pragma once

#include <cstdint>
#include <map>

#include "hixl_abi.h"

namespace cann_sim::hixl_sim {

struct Options {
  std::uint32_t traffic_class = 0xffffffff;
  std::uint32_t service_level = 0xffffffff;
  std::uint64_t pool_buffers = 4;
  std::uint64_t pool_mib = 8;  // of each buffer
  std::size_t max_channels = 512;
  bool auto_connect = false;

  std::uint64_t pool_bytes() const { return pool_buffers * pool_mib << 20; }
};

// Throws Refused(103900) for an unknown key or a bad value.
Options read_options(const std::map<ge::AscendString, ge::AscendString> &given);

}  // namespace cann_sim::hixl_sim
