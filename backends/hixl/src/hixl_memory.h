// Memory registration through the vendor's engine.
#ifndef KVLINK_HIXL_MEMORY_H
#define KVLINK_HIXL_MEMORY_H

#include <map>
#include <memory>
#include <mutex>

#include "ascend/memory.h"
#include "vendor.h"

namespace kvlink::hixl_provider {

class HixlMemory final : public ascend::VendorMemory {
 public:
  explicit HixlMemory(std::shared_ptr<HixlEngine> hixl) : hixl_(std::move(hixl)) {}

  Failure register_memory(uint64_t address, uint64_t length, bool on_device, void **handle) override;
  // A peer that is still connected to this engine holds its memory bound, and only it can let go: it is given a moment.
  Failure deregister_memory(void *handle) override;

  // The vendor's engine is finalized, and with it every registration: nothing is left to deregister.
  void finalized();

  // Whether this engine registered it: memory that another engine of the process registered is unknown to this one.
  bool owns(void *handle) const;
  // Whether something that starts at `address` or contains it is registered.
  bool covers(uint64_t address) const;

 private:
  struct Range {
    uint64_t address, length;
  };
  std::shared_ptr<HixlEngine> hixl_;  // null: finalized
  mutable std::mutex mutex_;
  std::map<void *, Range> handles_;
  bool stuck_ = false;  // the last wait for peers was in vain: do not wait again for each region
};

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_MEMORY_H
