#include "ascend/memory.h"

#include <algorithm>
#include <cinttypes>

#include "ascend/errors.h"

namespace kvlink::ascend {
namespace {

constexpr uint64_t kHostPage = 4096;

const char *kind_name(bool on_device) { return on_device ? "device" : "host"; }

}  // namespace

Bindings::~Bindings() { drop(); }

Bindings &Bindings::operator=(Bindings &&other) noexcept {
  if (this != &other) {
    drop();
    regions_ = std::move(other.regions_);
    other.regions_.clear();
    sequence_ = other.sequence_;
  }
  return *this;
}

void Bindings::drop() {
  for (const std::shared_ptr<Region> &region : regions_) region->bindings.fetch_sub(1);
  regions_.clear();
}

Memory::Memory(std::shared_ptr<const Device> device, VendorMemory &vendor, const MemoryRules &rules, std::string owner)
    : device_(std::move(device)), vendor_(vendor), rules_(rules), owner_(std::move(owner)) {}

Memory::~Memory() {
  // The core closed everything; what is left belongs to links whose vendor call hangs, and is left alone with them.
  const ContextGuard guard = device_->enter();
  for (const auto &item : allocations_) {
    if (!quarantine_.check(item.first, item.second.length, "mem_free").ok()) continue;
    void *memory = reinterpret_cast<void *>(item.first);
    static_cast<void>(item.second.on_device ? device_->acl().aclrtFree(memory) : device_->acl().aclrtFreeHost(memory));
  }
}

Failure Memory::allocate(uint32_t kind, uint64_t length, uint64_t *address) {
  if (kind > KVL_MEMORY_DEVICE) return make_failure(KVL_UNSUPPORTED, "mem_alloc", "memory kind %u", kind);
  const ContextGuard guard = device_->enter();
  if (!guard.ok()) return guard.failure();
  const bool on_device = kind == KVL_MEMORY_DEVICE;
  void *memory = nullptr;
  const Failure failure =
      on_device ? allocate_device(device_->acl(), length, &memory) : allocate_pinned(device_->acl(), length, &memory);
  if (!failure.ok()) return failure;
  *address = reinterpret_cast<uint64_t>(memory);
  const std::lock_guard<std::mutex> lock(mutex_);
  allocations_.emplace(*address, Allocation{length, on_device});
  return {};
}

void Memory::free(uint64_t address) {
  Allocation allocation{};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = allocations_.find(address);
    if (found == allocations_.end()) return;
    allocation = found->second;
    // ACL's free does not wait for a DMA under way: memory in quarantine stays until the process ends.
    if (!quarantine_.check(address, allocation.length, "mem_free").ok()) return;
    allocations_.erase(found);
  }
  const ContextGuard guard = device_->enter();
  void *memory = reinterpret_cast<void *>(address);
  static_cast<void>(allocation.on_device ? device_->acl().aclrtFree(memory) : device_->acl().aclrtFreeHost(memory));
}

bool Memory::is_own_allocation(uint64_t address, uint64_t length) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin()) return false;
  --next;
  return address + length <= next->first + next->second.length;
}

Failure Memory::check(const kvl_mem_desc &desc) const {
  if (desc.address == 0 || desc.length == 0 || desc.address + desc.length < desc.address) {
    return make_failure(KVL_INVALID, "mem_open", "address %#" PRIx64 " with length %" PRIu64 " is no memory range",
                        desc.address, desc.length);
  }
  if (desc.kind > KVL_MEMORY_DEVICE) return make_failure(KVL_UNSUPPORTED, "mem_open", "memory kind %u", desc.kind);
  if ((desc.access & ~uint32_t{KVL_ACCESS_READ | KVL_ACCESS_WRITE}) != 0) {
    return make_failure(KVL_INVALID, "mem_open", "access %#x; expected READ (1) and WRITE (2), or-ed", desc.access);
  }
  const bool on_device = desc.kind == KVL_MEMORY_DEVICE;
  if (on_device && desc.device >= 0 && desc.device != device_->id()) {
    return make_failure(KVL_INVALID, "mem_open", "the memory is on npu:%d; this channel is on npu:%d: open one there",
                        desc.device, device_->id());
  }
  const PointerKind found = pointer_kind(device_->acl(), reinterpret_cast<const void *>(desc.address));
  if (on_device != (found == PointerKind::kDevice)) {
    return make_failure(KVL_INVALID, "mem_open", "%#" PRIx64 " is %s memory; it was registered as %s memory",
                        desc.address, kind_name(found == PointerKind::kDevice), kind_name(on_device));
  }
  // The vendor maps host memory through aclrtHostRegister, which takes whole pages; it would say so at the connect.
  if (!on_device && !rules_.stage_host && desc.address % kHostPage != 0) {
    return make_failure(KVL_UNSUPPORTED, "mem_open",
                        "host memory at %#" PRIx64
                        " does not start at a multiple of 4096 bytes, which aclrtHostRegister needs: use "
                        "Channel.allocate(device=\"cpu\"), align the buffer, or use option host_staging",
                        desc.address);
  }
  if (on_device && rules_.hccs_alignment && desc.address % kHugePage != 0) {
    return make_failure(KVL_INVALID, "mem_open",
                        "device memory at %#" PRIx64
                        " does not start at a multiple of 2 MiB, which HCCS links need: use "
                        "Channel.allocate, align the buffer, or use link: roce",
                        desc.address);
  }
  return {};
}

Failure Memory::enroll(const std::shared_ptr<Region> &region) {
  const bool on_device = region->kind == KVL_MEMORY_DEVICE;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (rules_.max_regions != 0 && bindable_.size() >= rules_.max_regions) {
      return make_failure(
          KVL_NO_RESOURCE, "mem_open",
          "%zu regions are registered, as many as CANN %s takes: register whole buffers instead of parts",
          bindable_.size(), device_->cann().text.c_str());
    }
    if (!on_device && rules_.max_host_bytes != 0 && host_bytes_ + region->length > rules_.max_host_bytes) {
      return make_failure(KVL_NO_RESOURCE, "mem_open",
                          "%" PRIu64 " bytes of host memory beside the %" PRIu64
                          " registered are more than this driver's "
                          "limit of %" PRIu64 ": use option host_staging, or driver 25.5 or later",
                          region->length, host_bytes_, rules_.max_host_bytes);
    }
  }
  const Registry::Range range{device_->id(), region->address, region->length, on_device};
  const Failure failure = Registry::process().acquire(
      range, owner_,
      [&](void **handle) { return vendor_.register_memory(region->address, region->length, on_device, handle); },
      &region->vendor);
  if (!failure.ok()) return failure;
  const std::lock_guard<std::mutex> lock(mutex_);
  region->sequence = ++sequence_;
  bindable_.push_back(region);
  (on_device ? device_bytes_ : host_bytes_) += region->length;
  return {};
}

Failure Memory::expel(const std::shared_ptr<Region> &region) {
  const bool on_device = region->kind == KVL_MEMORY_DEVICE;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (region->bindings.load() > 0) {
      return make_failure(KVL_BUSY, "mem_close", "%" PRIu64 " bytes at %#" PRIx64 " are bound to %u live link(s)",
                          region->length, region->address, region->bindings.load());
    }
    // No link binds it from here on.
    bindable_.erase(std::remove(bindable_.begin(), bindable_.end(), region), bindable_.end());
  }
  const Registry::Range range{device_->id(), region->address, region->length, on_device};
  const Failure failure =
      Registry::process().release(range, [&](void *handle) { return vendor_.deregister_memory(handle); });
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure.ok()) {
    bindable_.push_back(region);
    return failure;
  }
  (on_device ? device_bytes_ : host_bytes_) -= region->length;
  return {};
}

Failure Memory::open(uint32_t mem, const kvl_mem_desc &desc) {
  const ContextGuard guard = device_->enter();
  if (!guard.ok()) return guard.failure();
  Failure failure = check(desc);
  if (!failure.ok()) return failure;
  auto region = std::make_shared<Region>();
  region->handle = mem;
  region->access = desc.access;
  region->kind = desc.kind;
  region->address = desc.address;
  region->length = desc.length;
  region->staged = desc.kind == KVL_MEMORY_HOST && rules_.stage_host && !is_own_allocation(desc.address, desc.length);
  if (!region->staged) {
    failure = enroll(region);
    if (!failure.ok()) return failure;
  }
  if (regions_.insert(region)) return {};
  if (!region->staged) static_cast<void>(expel(region));
  return make_failure(KVL_STATE, "mem_open", "handle %#x is open already", mem);
}

Failure Memory::close(uint32_t mem) {
  const std::shared_ptr<Region> region = regions_.get(mem);
  if (region == nullptr) return make_failure(KVL_INVALID, "mem_close", "no region is open under handle %#x", mem);
  Failure failure = quarantine_.check(region->address, region->length, "mem_close");
  if (!failure.ok()) return failure;
  if (!region->staged) {
    const ContextGuard guard = device_->enter();
    if (!guard.ok()) return guard.failure();
    failure = expel(region);
    if (!failure.ok()) return failure;
  }
  // Waits for whoever reads the table right now: after this no copy of the staging area touches the memory.
  regions_.erase(mem);
  return {};
}

Failure Memory::describe(uint32_t mem, void *buffer, uint64_t *length) {
  const std::shared_ptr<Region> region = regions_.get(mem);
  if (region == nullptr) return make_failure(KVL_INVALID, "mem_export", "no region is open under handle %#x", mem);
  const RegionBlob blob = make_region_blob(*region);
  return export_bytes(&blob, sizeof blob, buffer, length, "mem_export");
}

Failure Memory::copy(uint32_t mem, uint64_t offset, void *host, uint64_t length, bool to_region) {
  const std::shared_ptr<Region> region = regions_.get(mem);
  if (region == nullptr) return make_failure(KVL_INVALID, "mem_copy", "no region is open under handle %#x", mem);
  if (offset > region->length || length > region->length - offset) {
    return make_failure(KVL_INVALID, "mem_copy", "%" PRIu64 " bytes at offset %" PRIu64 " leave a region of %" PRIu64,
                        length, offset, region->length);
  }
  if (length == 0) return {};
  void *inside = reinterpret_cast<void *>(region->address + offset);
  if (region->kind == KVL_MEMORY_HOST) {
    std::memcpy(to_region ? inside : host, to_region ? host : inside, length);
    return {};
  }
  const ContextGuard guard = device_->enter();
  if (!guard.ok()) return guard.failure();
  const AclApi &acl = device_->acl();
  const aclError code = to_region ? acl.aclrtMemcpy(inside, length, host, length, ACL_MEMCPY_HOST_TO_DEVICE)
                                  : acl.aclrtMemcpy(host, length, inside, length, ACL_MEMCPY_DEVICE_TO_HOST);
  if (code == ACL_SUCCESS) return {};
  return vendor_failure(&acl, Vendor::kAcl, "aclrtMemcpy", code, "%" PRIu64 " bytes could not be copied", length);
}

Failure Memory::open_internal(uint64_t address, uint64_t length, std::shared_ptr<Region> *region, uint32_t kind) {
  const ContextGuard guard = device_->enter();
  if (!guard.ok()) return guard.failure();
  auto made = std::make_shared<Region>();
  made->kind = kind;
  made->address = address;
  made->length = length;
  const Failure failure = enroll(made);
  if (failure.ok()) *region = made;
  return failure;
}

Failure Memory::close_internal(const std::shared_ptr<Region> &region) {
  const Failure failure = quarantine_.check(region->address, region->length, "engine_close");
  if (!failure.ok()) return failure;
  const ContextGuard guard = device_->enter();
  return guard.ok() ? expel(region) : guard.failure();
}

Bindings Memory::bind() {
  Bindings bindings;
  const std::lock_guard<std::mutex> lock(mutex_);
  bindings.regions_ = bindable_;
  for (const std::shared_ptr<Region> &region : bindings.regions_) region->bindings.fetch_add(1);
  bindings.sequence_ = sequence_;
  return bindings;
}

uint64_t Memory::registered_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return host_bytes_ + device_bytes_;
}

}  // namespace kvlink::ascend
