// Pinned host memory (aclrtMallocHost) and host registrations with their device-side addresses.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "arena.h"
#include "call.h"
#include "memory.h"
#include "refused.h"

namespace cann_sim {
namespace {

constexpr uint64_t kPage = 4096;
constexpr int kFirstWithHostCodes = 850;  // 507910 and 507911 are new in 8.5

struct Registration {
  uint64_t bytes = 0;
  uint64_t mapped = 0;  // device-side address: PROT_NONE, no bytes behind it
  int device = 0;
};

struct HostMemory {
  std::mutex mutex;
  std::map<uint64_t, uint64_t> pinned;          // start -> bytes
  std::map<uint64_t, Registration> registered;  // start -> registration
  std::map<uint64_t, uint64_t> refused;         // start -> bytes, for the pointer probe
};

HostMemory &host_memory() {
  static HostMemory *const kMemory = new HostMemory;
  return *kMemory;
}

uint64_t mapped_length(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

bool inside(const std::map<uint64_t, uint64_t> &ranges, uint64_t address, uint64_t bytes, uint64_t *start) {
  auto at = ranges.upper_bound(address);
  if (at == ranges.begin()) return false;
  --at;
  *start = at->first;
  const uint64_t offset = address - at->first;
  return offset < at->second && bytes <= at->second - offset;
}

bool overlaps(const std::map<uint64_t, Registration> &registered, uint64_t address, uint64_t bytes) {
  auto at = registered.upper_bound(address);
  if (at != registered.end() && at->first < address + bytes) return true;
  if (at == registered.begin()) return false;
  --at;
  return address < at->first + at->second.bytes;
}

// True when every page of the range exists.
bool mapped_pages(uint64_t address, uint64_t bytes) {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t from = address / page * page;
  const uint64_t length = address + bytes - from;
  constexpr uint64_t kStep = uint64_t{1} << 30;
  std::vector<unsigned char> resident(std::min(length, kStep) / page + 1);
  for (uint64_t done = 0; done < length; done += kStep) {
    const uint64_t step = std::min(kStep, length - done);
    if (::mincore(reinterpret_cast<void *>(from + done), step, resident.data()) != 0) return false;
  }
  return true;
}

}  // namespace

int host_malloc(uint64_t bytes, void **address) {
  if (address == nullptr || bytes == 0) return fail(8, kRtParamInvalid, "aclrtMallocHost: null pointer or 0 bytes");
  void *at = ::mmap(nullptr, mapped_length(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return fail(8, kRtMemoryAllocation, "aclrtMallocHost: %s", std::strerror(errno));
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  m.pinned[reinterpret_cast<uint64_t>(at)] = bytes;
  count_live("host_memory", 1);
  *address = at;
  return kAclOk;
}

int host_free(void *address) {
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const auto found = m.pinned.find(reinterpret_cast<uint64_t>(address));
  if (found == m.pinned.end()) return fail(8, kRtParamInvalid, "aclrtFreeHost(%p): not from aclrtMallocHost", address);
  ::munmap(address, mapped_length(found->second));
  m.pinned.erase(found);
  count_live("host_memory", -1);
  return kAclOk;
}

int host_register(void *address, uint64_t bytes, int user_device, void **device_address, bool allow_pinned) {
  const uint64_t start = reinterpret_cast<uint64_t>(address);
  if (address == nullptr || bytes == 0 || device_address == nullptr) {
    return fail(9, kRtParamInvalid, "aclrtHostRegister: null pointer or 0 bytes");
  }
  if (start % kPage != 0) return fail(9, kRtParamInvalid, "aclrtHostRegister(%p): start is not 4 KiB aligned", address);
  Located located;
  bool freed = false;
  if (locate_device(start, &located, &freed)) {
    return fail(9, kRtParamInvalid, "aclrtHostRegister(%p): device memory", address);
  }
  if (settings().host_pin_cap != 0 && bytes > settings().host_pin_cap) {
    return fail(9, kRtMemoryAllocation, "aclrtHostRegister: %llu bytes are more than the host can pin",
                static_cast<unsigned long long>(bytes));
  }
  if (!mapped_pages(start, bytes)) return fail(9, kRtDriverError, "aclrtHostRegister(%p): no such memory", address);
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  uint64_t around = 0;
  const bool pinned = inside(m.pinned, start, bytes, &around);
  if (settings().old_kernel && !pinned) {
    return fail(9, kRtDriverError, "aclrtHostRegister(%p): this kernel takes memory of aclrtMallocHost only", address);
  }
  if (pinned && !allow_pinned) return fail(9, kRtParamInvalid, "aclrtHostRegisterV2(%p): pinned already", address);
  if (overlaps(m.registered, start, bytes)) {
    return fail(9, flavour().number >= kFirstWithHostCodes ? kRtHostAlreadyRegistered : kRtDriverError,
                "aclrtHostRegister(%p): registered already", address);
  }
  void *mapped = ::mmap(nullptr, mapped_length(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return fail(9, kRtMemoryAllocation, "aclrtHostRegister: %s", std::strerror(errno));
  m.registered[start] = {bytes, reinterpret_cast<uint64_t>(mapped), user_device};
  count_live("host_registration", 1);
  *device_address = mapped;
  return kAclOk;
}

int host_unregister(void *address) {
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const auto found = m.registered.find(reinterpret_cast<uint64_t>(address));
  if (found == m.registered.end()) {
    return fail(9, flavour().number >= kFirstWithHostCodes ? kRtHostNotRegistered : kRtDriverError,
                "aclrtHostUnregister(%p): not registered", address);
  }
  ::munmap(reinterpret_cast<void *>(found->second.mapped), mapped_length(found->second.bytes));
  m.registered.erase(found);
  count_live("host_registration", -1);
  return kAclOk;
}

int host_device_address(void *address, void **device_address) {
  if (device_address == nullptr) return fail(9, kRtParamInvalid, "aclrtHostGetDevicePointer: null pointer");
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  auto found = m.registered.upper_bound(at);
  if (found == m.registered.begin() || at - (--found)->first >= found->second.bytes) {
    return fail(9, kRtHostNotRegistered, "aclrtHostGetDevicePointer(%p): not registered", address);
  }
  *device_address = reinterpret_cast<void *>(found->second.mapped + (at - found->first));
  return kAclOk;
}

void refuse_pointer(const void *start, size_t bytes) {
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  m.refused[reinterpret_cast<uint64_t>(start)] = bytes;
}

bool pointer_refused(const void *address) {
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  uint64_t start = 0;
  return inside(m.refused, reinterpret_cast<uint64_t>(address), 1, &start);
}

bool locate_host(uint64_t address, Located *located) {
  HostMemory &m = host_memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  uint64_t start = 0;
  for (const auto &[host, registration] : m.registered) {
    if (address >= registration.mapped && address - registration.mapped < registration.bytes) {
      *located = {Place::kMapped, registration.mapped, registration.bytes, registration.device, false};
      return true;
    }
    if (address >= host && address - host < registration.bytes) {
      *located = {Place::kRegistered, host, registration.bytes, -1, false};
      return true;
    }
  }
  if (!inside(m.pinned, address, 1, &start)) return false;
  *located = {Place::kPinned, start, m.pinned[start], -1, false};
  return true;
}

}  // namespace cann_sim
