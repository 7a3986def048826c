// The RoCE address of an NPU (device_ip): from an option, /etc/hccn.conf, or hccn_tool.
#ifndef KVLINK_ASCEND_ADDRESS_H
#define KVLINK_ASCEND_ADDRESS_H

#include <string>

#include "ascend/library.h"

namespace kvlink::ascend {

struct DeviceAddress {
  std::string ip;      // empty: not found, which only HCCS links tolerate
  std::string source;  // "option device_ip", the file, the tool
  std::string tried;   // for the message of a link that needs one
};

// `configured` (an option) wins. Never blocks longer than `tool_timeout_ms` for hccn_tool.
DeviceAddress find_device_address(int32_t physical_device, const std::string &configured, uint32_t tool_timeout_ms);

// The lines of hccn.conf and of hccn_tool's answer.
std::string address_in_hccn_conf(const std::string &text, int32_t physical_device);
std::string address_in_tool_output(const std::string &text);

// The failure for a link that needs an address and has none.
Failure missing_device_address(const DeviceAddress &address, int32_t physical_device, const char *site);

bool is_ip_address(const std::string &text);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_ADDRESS_H
