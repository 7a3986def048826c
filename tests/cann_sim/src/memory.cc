// Device memory: one reserved range of addresses a device, its hidden twin, and the allocations in it.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include "arena.h"
#include "call.h"

namespace cann_sim {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHuge = uint64_t{2} << 20;
constexpr uint64_t kGiant = uint64_t{1} << 30;
constexpr uint64_t kSkew = 64;                          // the contract of aclrtMalloc, and not a byte more
constexpr uint64_t kPoisonBytes = uint64_t{1} << 20;    // of a new allocation, so that reads of fresh memory show
constexpr uint64_t kDeviceBase = 0x12c000000000;        // where the addresses of real devices lie
constexpr uint64_t kDeviceSpacing = uint64_t{1} << 40;  //

struct Allocation {
  uint64_t bytes = 0;     // as asked for
  uint64_t reserved = 0;  // pages, from the page of the start
  bool huge = false;
};

struct Arena {
  uint64_t base = 0;
  uint64_t hidden = 0;
  uint64_t size = 0;
  uint64_t next = 0;  // offset where the search for room begins: freed addresses come back as late as possible
  uint64_t used = 0;  // HBM
  std::map<uint64_t, Allocation> live;  // by start address
};

struct Memory {
  std::mutex mutex;
  std::map<int, Arena> arenas;
};

Memory &memory() {
  static Memory *const kMemory = new Memory;
  return *kMemory;
}

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t reserve(uint64_t hint, uint64_t bytes, uint64_t alignment) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (hint != 0) {  // a wish: whoever has that range keeps it
    void *at = ::mmap(reinterpret_cast<void *>(hint), bytes, PROT_NONE, kFlags, -1, 0);
    if (at != MAP_FAILED && reinterpret_cast<uint64_t>(at) % alignment == 0) return reinterpret_cast<uint64_t>(at);
    if (at != MAP_FAILED) ::munmap(at, bytes);
  }
  void *at = ::mmap(nullptr, bytes + alignment, PROT_NONE, kFlags, -1, 0);
  return at == MAP_FAILED ? 0 : round_up(reinterpret_cast<uint64_t>(at), alignment);
}

Arena *arena_of(Memory &m, int device) {
  Arena &arena = m.arenas[device];
  if (arena.size == 0) {
    const uint64_t size = std::max(round_up(4 * settings().hbm_bytes, kGiant), 8 * kGiant);
    arena.base = reserve(kDeviceBase + kDeviceSpacing * static_cast<uint64_t>(device), size, kHuge);
    arena.hidden = reserve(0, size, kHuge);
    if (arena.base == 0 || arena.hidden == 0) return nullptr;
    arena.size = size;
  }
  return &arena;
}

// The first room of `bytes` at or behind `from`, its start a multiple of `alignment`; one page stays free behind it.
bool find_room(const Arena &arena, uint64_t from, uint64_t bytes, uint64_t alignment, uint64_t *offset) {
  uint64_t at = round_up(from, alignment);
  for (const auto &[start, allocation] : arena.live) {
    const uint64_t begin = (start - arena.base) / kPage * kPage;
    const uint64_t end = begin + allocation.reserved + kPage;
    if (end <= at) continue;
    if (at + bytes + kPage <= begin) break;
    at = round_up(end, alignment);
  }
  if (at + bytes + kPage > arena.size) return false;
  *offset = at;
  return true;
}

void drop_pages(const Arena &arena, uint64_t offset, uint64_t bytes) {
  ::mmap(reinterpret_cast<void *>(arena.hidden + offset), bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

struct Policy {
  bool huge = false;
  uint64_t alignment = kPage;
  uint64_t skew = kSkew;
};

Policy policy_of(uint32_t policy, uint64_t bytes) {
  switch (policy & 0xffU) {
    case 1:  // HUGE_ONLY
    case 4:  // HUGE_ONLY_P2P
      return {true, kHuge, 0};
    case 6:  // HUGE1G_ONLY
    case 7:  // HUGE1G_ONLY_P2P
      return {true, kGiant, 0};
    case 2:  // NORMAL_ONLY
    case 5:  // NORMAL_ONLY_P2P
      return {};
    default:  // HUGE_FIRST and unknown values: huge pages from 2 MiB on, but no promise about the start
      return {bytes >= kHuge, kPage, kSkew};
  }
}

const Arena *arena_around(const Memory &m, uint64_t address, int *device) {
  for (const auto &[id, arena] : m.arenas) {
    if (arena.size != 0 && address >= arena.base && address - arena.base < arena.size) {
      *device = id;
      return &arena;
    }
  }
  return nullptr;
}

// The live allocation of which [address, +bytes) is a part.
bool find_live(const Arena &arena, uint64_t address, uint64_t bytes, uint64_t *start, Allocation *found) {
  auto at = arena.live.upper_bound(address);
  if (at == arena.live.begin()) return false;
  --at;
  const uint64_t offset = address - at->first;
  if (offset >= at->second.bytes || bytes > at->second.bytes - offset) return false;
  *start = at->first;
  *found = at->second;
  return true;
}

}  // namespace

int device_malloc(int user_device, uint64_t bytes, uint32_t policy, void **address) {
  if (address == nullptr) return fail(6, kRtParamInvalid, "aclrtMalloc: devPtr is null");
  if (bytes == 0) return fail(6, kRtParamInvalid, "aclrtMalloc of 0 bytes");
  const Policy how = policy_of(policy, bytes);
  if (bytes > settings().hbm_bytes) return fail(6, kRtMemoryAllocation, "aclrtMalloc of more than the device has");
  const uint64_t reserved = how.skew == 0 ? round_up(bytes, how.alignment) : round_up(bytes + how.skew, kPage);
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  Arena *arena = arena_of(m, user_device);
  if (arena == nullptr)
    return fail(6, kRtMemoryAllocation, "no address space for device %d: %s", user_device, std::strerror(errno));
  uint64_t offset = 0;
  if (arena->used + reserved > settings().hbm_bytes ||
      (!find_room(*arena, arena->next, reserved, how.alignment, &offset) &&
       !find_room(*arena, 0, reserved, how.alignment, &offset))) {
    return fail(6, kRtMemoryAllocation, "device %d has no %llu bytes left", user_device,
                static_cast<unsigned long long>(bytes));
  }
  void *hidden = reinterpret_cast<void *>(arena->hidden + offset);
  if (::mprotect(hidden, reserved, PROT_READ | PROT_WRITE) != 0) {
    return fail(6, kRtMemoryAllocation, "this host has no memory behind %llu bytes: %s",
                static_cast<unsigned long long>(bytes), std::strerror(errno));
  }
  std::memset(hidden, 0xcd, std::min(reserved, kPoisonBytes));
  const uint64_t start = arena->base + offset + how.skew;
  arena->live[start] = {bytes, reserved, how.huge};
  arena->used += reserved;
  arena->next = offset + reserved + kPage;
  count_live("device_memory", 1);
  *address = reinterpret_cast<void *>(start);
  return kAclOk;
}

int device_free(void *address) {
  const uint64_t start = reinterpret_cast<uint64_t>(address);
  bool freed = false;
  {
    Memory &m = memory();
    std::lock_guard<std::mutex> lock(m.mutex);
    int device = -1;
    Arena *arena = const_cast<Arena *>(arena_around(m, start, &device));
    if (arena != nullptr) {
      const auto found = arena->live.find(start);
      if (found != arena->live.end()) {
        drop_pages(*arena, (start - arena->base) / kPage * kPage, found->second.reserved);
        arena->used -= found->second.reserved;
        arena->live.erase(found);
        count_live("device_memory", -1);
        return kAclOk;
      }
      uint64_t around = 0;
      Allocation allocation;
      freed = !find_live(*arena, start, 1, &around, &allocation);
    }
  }
  if (freed) violation(6, "aclrtFree(%p): freed before, or never allocated", address);
  return fail(6, kRtParamInvalid, "aclrtFree(%p): not the start of device memory", address);
}

void free_device_memory(int user_device) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const auto found = m.arenas.find(user_device);
  if (found == m.arenas.end()) return;
  Arena &arena = found->second;
  for (const auto &[start, allocation] : arena.live) {
    drop_pages(arena, (start - arena.base) / kPage * kPage, allocation.reserved);
    arena.used -= allocation.reserved;
    count_live("device_memory", -1);
  }
  arena.live.clear();
}

bool charge_hbm(int user_device, uint64_t bytes) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  Arena *arena = arena_of(m, user_device);
  if (arena == nullptr || arena->used + bytes > settings().hbm_bytes) return false;
  arena->used += bytes;
  return true;
}

void release_hbm(int user_device, uint64_t bytes) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const auto found = m.arenas.find(user_device);
  if (found != m.arenas.end()) found->second.used -= std::min(found->second.used, bytes);
}

uint64_t hbm_free(int user_device) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  const auto found = m.arenas.find(user_device);
  return found == m.arenas.end() ? settings().hbm_bytes : settings().hbm_bytes - found->second.used;
}

uint64_t hidden_address(uint64_t address, uint64_t bytes) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  int device = -1;
  const Arena *arena = arena_around(m, address, &device);
  uint64_t start = 0;
  Allocation allocation;
  if (arena == nullptr || !find_live(*arena, address, bytes, &start, &allocation)) return 0;
  return arena->hidden + (address - arena->base);
}

bool locate_device(uint64_t address, Located *located, bool *freed) {
  Memory &m = memory();
  std::lock_guard<std::mutex> lock(m.mutex);
  int device = -1;
  const Arena *arena = arena_around(m, address, &device);
  if (arena == nullptr) return false;
  uint64_t start = 0;
  Allocation allocation;
  *freed = !find_live(*arena, address, 1, &start, &allocation);
  if (*freed) {
    *located = {Place::kFreed, 0, 0, device, false};
  } else {
    *located = {Place::kDevice, start, allocation.bytes, device, allocation.huge};
  }
  return true;
}

bool in_one_allocation(const void *address, uint64_t bytes) {
  return hidden_address(reinterpret_cast<uint64_t>(address), bytes) != 0;
}

Located locate(const void *address) {
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  Located located;
  bool freed = false;
  if (locate_device(at, &located, &freed)) return located;
  if (locate_host(at, &located)) return located;
  return {};
}

}  // namespace cann_sim
