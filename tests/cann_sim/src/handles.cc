// Handles given to clients: never reused, and an address no program can map, so that touching one faults.
#include <atomic>
#include <cstdint>

#include "context.h"

namespace cann_sim {
namespace {

constexpr uint64_t kBase = 0x5ca0000000000000;  // above every user address
constexpr uint64_t kStep = 0x40;
std::atomic<uint64_t> next{1};

}  // namespace

void *new_handle() {
  return reinterpret_cast<void *>(kBase + kStep * next.fetch_add(1));  // NOLINT: a number in the shape of a pointer
}

bool was_handle(const void *handle) {
  const uint64_t value = reinterpret_cast<uint64_t>(handle);
  return value > kBase && value < kBase + kStep * next.load() && (value - kBase) % kStep == 0;
}

}  // namespace cann_sim
