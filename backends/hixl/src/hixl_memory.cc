#include "hixl_memory.h"

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <thread>

#include "host/socket.h"

namespace kvlink::hixl_provider {
namespace {

constexpr uint64_t kPeersLetGoNs = 800u * 1000000u;
constexpr auto kLookAgain = std::chrono::milliseconds(5);

std::string describe(const char *verb, uint64_t address, uint64_t length, bool on_device) {
  char text[160];
  std::snprintf(text, sizeof text, "cannot %s %" PRIu64 " bytes of %s memory at 0x%" PRIx64, verb, length,
                on_device ? "device" : "host", address);
  return text;
}

}  // namespace

Failure HixlMemory::register_memory(uint64_t address, uint64_t length, bool on_device, void **handle) {
  void *made = nullptr;
  const uint32_t code = hixl_->shim().register_memory(hixl_->get(), address, length, on_device ? 1 : 0, &made);
  if (code != kSuccess) {
    return hixl_failure(hixl_->acl(), "Hixl::RegisterMem", code, describe("register", address, length, on_device));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  handles_[made] = Range{address, length};
  *handle = made;
  return {};
}

Failure HixlMemory::deregister_memory(void *handle) {
  bool patient;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    patient = !stuck_;
  }
  if (hixl_ == nullptr) return {};
  const uint64_t give_up = host::now_ns() + (patient ? kPeersLetGoNs : 0);
  for (;;) {
    const uint32_t code = hixl_->shim().deregister_memory(hixl_->get(), handle);
    if (code == kSuccess) break;
    if (code != kParamInvalid) {
      return hixl_failure(hixl_->acl(), "Hixl::DeregisterMem", code, "cannot deregister memory");
    }
    if (host::now_ns() >= give_up) {
      const std::lock_guard<std::mutex> lock(mutex_);
      stuck_ = true;
      Failure failure = hixl_failure(hixl_->acl(), "Hixl::DeregisterMem", code,
                                     "a peer is still connected to this engine and holds its memory bound: close the "
                                     "peers, then this region again");
      failure.status = KVL_BUSY;
      return failure;
    }
    // The vendor has no event for a peer that disconnects.
    std::this_thread::sleep_for(kLookAgain);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  stuck_ = false;
  handles_.erase(handle);
  return {};
}

void HixlMemory::finalized() { hixl_ = nullptr; }

bool HixlMemory::covers(uint64_t address) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto &item : handles_) {
    if (address >= item.second.address && address - item.second.address < item.second.length) return true;
  }
  return false;
}

bool HixlMemory::owns(void *handle) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return handles_.count(handle) != 0;
}

}  // namespace kvlink::hixl_provider
