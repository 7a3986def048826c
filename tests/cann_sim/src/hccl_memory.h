// Registered memory: the tables of HcclRegisterGlobalMem (rule 11) and the NIC's own table beneath them (rule 17).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "hccl_abi.h"
#include "hccl_ranktable.h"

namespace cann_sim::hccl {

constexpr std::uint64_t kHugePage = 2ULL << 20;
constexpr int kNoDevice = -1;

struct Region {
  void *handle = nullptr;
  int type = HCCL_MEM_TYPE_DEVICE;  // as registered: any number passes here
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
  int table = kNoDevice;         // 8.x: 0, one table a process; 9.0+: user device id, or kNoDevice, the reserve table
  bool global = true;            // false: HcclRegisterMem of one communicator
  std::uint32_t bound = 0;       // communicators that bound it
  std::uint32_t on_nic[2] = {};  // prepared communicators that use it, by link
  bool host_mapped = false;      // the library registered it with the driver

  bool overlaps(const Region &other) const { return start < other.start + other.bytes && other.start < start + bytes; }
};
using RegionPtr = std::shared_ptr<Region>;

// True when this flavour has the limit of 256 regions and the one table a process (CANN before 9.0).
bool old_tables();

// All functions take the process-wide lock themselves and throw Refused.
RegionPtr register_region(const HcclMem &mem);
void deregister_region(void *handle);
// The region of a handle in the table of this thread's device; throws Refused(1) for an unknown one.
RegionPtr find_region(void *handle);
void bind_region(const RegionPtr &region);
void unbind_region(const RegionPtr &region);

// What HcclCommPrepare does to each region: check it against the hardware's rules and enter it in the NIC's table of
// `device`, or only count one more user. Throws Refused.
void put_on_nic(const RegionPtr &region, Link link, int device);
void take_off_nic(const RegionPtr &region, Link link);

}  // namespace cann_sim::hccl
