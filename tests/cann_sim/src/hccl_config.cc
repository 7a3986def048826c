#include "hccl_config.h"

#include <algorithm>
#include <cstring>

#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr std::uint32_t kMagic = 0xf0f0f0f0;
constexpr std::uint32_t kNotSet = 0xffffffff;

struct Header {
  std::size_t size;
  std::uint32_t magic;
  std::uint32_t version;
  std::uint64_t reserved;
};
static_assert(sizeof(Header) == sizeof(HcclCommConfig::reserved));

struct OwnLayout {
  std::uint32_t version;
  std::size_t size;
};

// The newest layout each release knows.
OwnLayout own_layout() {
  if (flavour().number < 850) return {6, 312};
  if (flavour().number < 900) return {8, 2104};
  return {10, 2240};
}

[[noreturn]] void refuse(const std::string &text) {
  throw Refused(12, HCCL_E_PARA, "EI0003: communicator config: " + text);
}

}  // namespace

std::string read_config(const HcclCommConfig *config) {
  Header header{};
  std::memcpy(&header, config, sizeof header);
  // The library reads into a local that nobody cleared: fields beyond the caller's size are garbage.
  HcclCommConfig own;
  std::memset(&own, 0xa5, sizeof own);
  std::memcpy(&own, config, std::min(header.size, own_layout().size));
  std::memcpy(&header, &own, sizeof header);
  const std::uint32_t version = std::min(header.version, own_layout().version);
  const bool name_ends = std::memchr(own.hcclCommName, 0, sizeof own.hcclCommName) != nullptr;
  if (version < 2 || own.hcclCommName[0] == '\0') refuse("the communicator name is empty");
  if (header.magic != kMagic) refuse("the magic word is not 0xf0f0f0f0");
  if (!name_ends) refuse("the communicator name has no terminating zero in 128 bytes");
  if (header.version > own_layout().version) {
    log_event("config_newer_than_library", "\"version\":" + std::to_string(header.version));
  }
  if (own.hcclBufferSize == 0) refuse("hcclBufferSize is 0, at least 1 MB");
  if (version >= 5) {
    if (own.hcclRdmaTrafficClass != kNotSet && (own.hcclRdmaTrafficClass > 255 || own.hcclRdmaTrafficClass % 4 != 0)) {
      refuse("hcclRdmaTrafficClass is " + std::to_string(own.hcclRdmaTrafficClass));
    }
    if (own.hcclRdmaServiceLevel != kNotSet && own.hcclRdmaServiceLevel > 7) {
      refuse("hcclRdmaServiceLevel is " + std::to_string(own.hcclRdmaServiceLevel));
    }
  }
  if (version >= 7 && own.aclGraphZeroCopyEnable > 1) {
    refuse("aclGraphZeroCopyEnable is " + std::to_string(own.aclGraphZeroCopyEnable));
  }
  return own.hcclCommName;
}

}  // namespace cann_sim::hccl
