#include "hccl_memory.h"

#include <fstream>
#include <sstream>
#include <vector>

#include "hccl_connection.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

constexpr std::size_t kOldLimit = 256;

struct Registry {
  std::mutex mutex;
  std::map<void *, RegionPtr> regions;
  std::vector<std::weak_ptr<Region>> nic;  // every region that is in a NIC's table
  int first_device = kNoDevice;            // 8.x: the tables belong to the device that was current first
};

Registry &registry() {
  static auto &instance = *new Registry;  // outlives the threads of a process that is ending
  return instance;
}

// Which table the calling thread sees.
int current_table(Registry &state) {
  const int device = current_device();
  if (!old_tables()) return device;  // none current: kNoDevice, the reserve table
  if (device != kNoDevice && state.first_device == kNoDevice) state.first_device = device;
  if (device != kNoDevice && device != state.first_device) {
    throw Refused(11, HCCL_E_PARA,
                  "the memory table of this process belongs to device " + std::to_string(state.first_device) +
                      ", not to " + std::to_string(device));
  }
  return 0;
}

std::string describe(const Region &region) {
  std::ostringstream text;
  text << (region.type == HCCL_MEM_TYPE_HOST ? "host" : "device") << " memory 0x" << std::hex << region.start << " + 0x"
       << region.bytes;
  return text.str();
}

// True when every page of the range is mapped in this process.
bool mapped(std::uint64_t start, std::uint64_t bytes) {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  std::uint64_t at = start;
  while (std::getline(maps, line)) {
    std::uint64_t low = 0, high = 0;
    char dash = 0;
    std::istringstream fields(line);
    if (!(fields >> std::hex >> low >> dash >> high) || high <= at) continue;
    if (low > at) return false;
    at = high;
    if (at >= start + bytes) return true;
  }
  return false;
}

void check_device(const Region &region, Link link) {
  const auto *address = reinterpret_cast<const void *>(region.start);
  const HcclResult code = link == Link::roce ? HCCL_E_NETWORK : HCCL_E_RUNTIME;
  if (link == Link::hccs && region.start % kHugePage != 0) {
    throw Refused(17, HCCL_E_RUNTIME,
                  "EI0007: halShmemCreateHandle: Create_para_check fail, ret 8 (rt 507899): " + describe(region) +
                      " does not start at a multiple of 2 MiB");
  }
  const Located located = locate(address);
  if (located.place != Place::kDevice) {
    throw Refused(17, code,
                  "memory registration refused: " + describe(region) +
                      (located.place == Place::kFreed ? " was freed" : " is not device memory"));
  }
  if (!in_one_allocation(address, region.bytes)) {
    throw Refused(17, code, "ra_hdc_typical_mr ret(-13), 128102: " + describe(region) + " exceeds its allocation");
  }
}

std::uint64_t host_bytes_on_nic(const Registry &state) {
  std::uint64_t total = 0;
  for (const auto &weak : state.nic) {
    const RegionPtr region = weak.lock();
    if (region && region->type == HCCL_MEM_TYPE_HOST && region->on_nic[1] > 0) total += region->bytes;
  }
  return total;
}

void map_host(Registry &state, Region &region, Link link, int device) {
  auto *address = reinterpret_cast<void *>(region.start);
  const Place place = locate(address).place;
  if (place == Place::kDevice || place == Place::kMapped || place == Place::kFreed ||
      !mapped(region.start, region.bytes)) {
    throw Refused(17, HCCL_E_RUNTIME, "aclrtHostRegister failed (507899): " + describe(region) + " is not host memory");
  }
  if (!region.host_mapped) {
    void *seen_by_device = nullptr;
    const int code = host_register(address, region.bytes, device, &seen_by_device, true);
    if (code != kAclOk) {
      throw Refused(17, HCCL_E_RUNTIME, "aclrtHostRegister failed (" + std::to_string(code) + "): " + describe(region));
    }
    region.host_mapped = true;
  }
  const std::uint64_t cap = settings().host_mr_cap;
  if (link == Link::roce && cap != 0 && host_bytes_on_nic(state) + region.bytes > cap) {
    throw Refused(17, HCCL_E_NETWORK,
                  "ra_hdc_typical_mr ret(-13), 128102: the driver's tables hold " + std::to_string(cap) +
                      " bytes of host memory, " + describe(region) + " is too much");
  }
}

void unmap_if_unused(Region &region) {
  if (!region.host_mapped || region.on_nic[0] + region.on_nic[1] > 0) return;
  host_unregister(reinterpret_cast<void *>(region.start));
  region.host_mapped = false;
}

}  // namespace

bool old_tables() { return flavour().number < 900; }

RegionPtr register_region(const HcclMem &mem) {
  Registry &state = registry();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const int table = current_table(state);
  auto region = std::make_shared<Region>();
  region->type = mem.type;
  region->start = reinterpret_cast<std::uint64_t>(mem.addr);
  region->bytes = mem.size;
  region->table = table;
  if (region->start == 0 || region->bytes == 0 || region->start + region->bytes < region->start) {
    throw Refused(11, HCCL_E_PARA, "EI0003: HcclRegisterGlobalMem: " + describe(*region) + " is no range");
  }
  std::size_t count = 0;
  RegionPtr same;
  RegionPtr clash;
  for (const auto &[handle, other] : state.regions) {
    if (other->table != table) continue;
    ++count;
    if (other->type != region->type || !other->overlaps(*region)) continue;
    const bool equal = other->start == region->start && other->bytes == region->bytes;
    (equal ? same : clash) = other;
  }
  if (old_tables() && count >= kOldLimit) {
    throw Refused(11, HCCL_E_UNAVAIL, "EI0007: 256 regions are registered already; " + describe(*region));
  }
  if (same) return same;
  if (clash) throw Refused(11, HCCL_E_PARA, describe(*region) + " overlaps the registered " + describe(*clash));
  region->handle = new_handle();
  state.regions.emplace(region->handle, region);
  count_live("hccl_region", 1);
  return region;
}

void deregister_region(void *handle) {
  Registry &state = registry();
  int table = kNoDevice;
  bool last = false;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    table = current_table(state);
    const auto found = state.regions.find(handle);
    if (found == state.regions.end() || found->second->table != table) {
      throw Refused(19, HCCL_E_PARA, "EI0003: HcclDeregisterGlobalMem: the handle is not registered on this device");
    }
    if (found->second->bound > 0) {
      throw Refused(19, HCCL_E_PARA,
                    "HcclDeregisterGlobalMem: " + describe(*found->second) + " is still bound to " +
                        std::to_string(found->second->bound) + " communicators");
    }
    state.regions.erase(found);
    count_live("hccl_region", -1);
    last = true;
    for (const auto &[other_handle, other] : state.regions) last = last && other->table != table;
  }
  if (last) close_connections(old_tables() ? registry().first_device : table);
}

RegionPtr find_region(void *handle) {
  Registry &state = registry();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const int table = current_table(state);
  const auto found = state.regions.find(handle);
  if (found == state.regions.end() || found->second->table != table) {
    throw Refused(15, HCCL_E_PARA,
                  "EI0003: the memory handle is not registered on device " + std::to_string(current_device()) +
                      ", which is current in this thread");
  }
  return found->second;
}

void bind_region(const RegionPtr &region) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  ++region->bound;
}

void unbind_region(const RegionPtr &region) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  --region->bound;
}

void put_on_nic(const RegionPtr &region, Link link, int device) {
  Registry &state = registry();
  const std::lock_guard<std::mutex> lock(state.mutex);
  std::uint32_t &users = region->on_nic[static_cast<int>(link)];
  if (users > 0) {
    ++users;
    return;
  }
  for (const auto &weak : state.nic) {
    const RegionPtr other = weak.lock();
    if (!other || other == region || other->on_nic[static_cast<int>(link)] == 0 || other->table != region->table)
      continue;
    if (other->type != region->type && other->overlaps(*region)) {
      throw Refused(17, HCCL_E_INTERNAL,
                    describe(*region) + " overlaps the " + describe(*other) + " of the other type");
    }
  }
  if (region->type == HCCL_MEM_TYPE_DEVICE) {
    check_device(*region, link);
  } else if (region->type == HCCL_MEM_TYPE_HOST) {
    try {
      map_host(state, *region, link, device);
    } catch (const Refused &) {
      unmap_if_unused(*region);
      throw;
    }
  } else {
    throw Refused(17, link == Link::roce ? HCCL_E_NETWORK : HCCL_E_RUNTIME,
                  "memory type " + std::to_string(region->type) + " is neither DEVICE nor HOST");
  }
  users = 1;
  state.nic.push_back(region);
}

void take_off_nic(const RegionPtr &region, Link link) {
  Registry &state = registry();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (--region->on_nic[static_cast<int>(link)] > 0) return;
  unmap_if_unused(*region);
  if (region->on_nic[0] + region->on_nic[1] > 0) return;
  for (auto entry = state.nic.begin(); entry != state.nic.end();) {
    const RegionPtr other = entry->lock();
    entry = !other || other == region ? state.nic.erase(entry) : entry + 1;
  }
}

}  // namespace cann_sim::hccl
