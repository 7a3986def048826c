// This engine's memory: allocated, registered with the vendor once, described to peers, given back when nothing can
// touch it any more.
#ifndef KVLINK_ASCEND_MEMORY_H
#define KVLINK_ASCEND_MEMORY_H

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ascend/device.h"
#include "ascend/quarantine.h"
#include "ascend/regions.h"
#include "ascend/registry.h"

namespace kvlink::ascend {

// The vendor's registration, as a provider makes it. Called with the engine's context current.
class VendorMemory {
 public:
  virtual ~VendorMemory() = default;
  virtual Failure register_memory(uint64_t address, uint64_t length, bool on_device, void **handle) = 0;
  virtual Failure deregister_memory(void *handle) = 0;
};

struct MemoryRules {
  bool hccs_alignment = false;  // device memory must start at a 2 MiB boundary (option link: hccs)
  bool stage_host = false;      // host memory that mem_alloc did not give goes through the staging area
  uint64_t max_regions = 0;     // 0: no limit
  uint64_t max_host_bytes = 0;  // registered host memory in all; 0: no limit known
};

// The live links that the vendor bound regions to; dropping it unbinds them for mem_close's eyes.
class Bindings {
 public:
  Bindings() = default;
  Bindings(Bindings &&other) noexcept { *this = std::move(other); }
  Bindings &operator=(Bindings &&other) noexcept;
  ~Bindings();
  const std::vector<std::shared_ptr<Region>> &regions() const { return regions_; }
  uint64_t sequence() const { return sequence_; }  // regions with a higher one came later
  void drop();

 private:
  friend class Memory;
  std::vector<std::shared_ptr<Region>> regions_;
  uint64_t sequence_ = 0;
};

class Memory {
 public:
  Memory(std::shared_ptr<const Device> device, VendorMemory &vendor, const MemoryRules &rules, std::string owner);
  ~Memory();
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;

  // The slots of provider.h with the same names. They enter the device's context themselves.
  Failure allocate(uint32_t kind, uint64_t length, uint64_t *address);
  void free(uint64_t address);
  Failure open(uint32_t mem, const kvl_mem_desc &desc);
  Failure close(uint32_t mem);  // BUSY while bound to a live link or quarantined
  Failure describe(uint32_t mem, void *buffer, uint64_t *length);
  Failure copy(uint32_t mem, uint64_t offset, void *host, uint64_t length, bool to_region);

  // A region of the engine's own (the staging area): registered and bound like any, under no handle of the core's.
  Failure open_internal(uint64_t address, uint64_t length, std::shared_ptr<Region> *region,
                        uint32_t kind = KVL_MEMORY_HOST);
  Failure close_internal(const std::shared_ptr<Region> &region);

  // Everything that is registered with the vendor now, in order of registration, counted as bound until dropped.
  Bindings bind();

  RegionTable &regions() { return regions_; }
  Quarantine &quarantine() { return quarantine_; }
  uint64_t registered_bytes() const;

 private:
  struct Allocation {
    uint64_t length;
    bool on_device;
  };
  Failure check(const kvl_mem_desc &desc) const;
  Failure enroll(const std::shared_ptr<Region> &region);
  Failure expel(const std::shared_ptr<Region> &region);
  bool is_own_allocation(uint64_t address, uint64_t length) const;

  const std::shared_ptr<const Device> device_;
  VendorMemory &vendor_;
  const MemoryRules rules_;
  const std::string owner_;
  RegionTable regions_;
  Quarantine quarantine_;
  mutable std::mutex mutex_;                       // guards what follows; never held across a vendor call
  std::vector<std::shared_ptr<Region>> bindable_;  // registered with the vendor, in order
  std::map<uint64_t, Allocation> allocations_;
  uint64_t sequence_ = 0;
  uint64_t host_bytes_ = 0, device_bytes_ = 0;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_MEMORY_H
