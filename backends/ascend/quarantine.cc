#include "ascend/quarantine.h"

#include <cinttypes>

namespace kvlink::ascend {

uint64_t Quarantine::add(uint64_t address, uint64_t length, const std::string &why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  items_.emplace(next_, Item{address, length, why});
  return next_++;
}

void Quarantine::release(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  items_.erase(id);
}

Failure Quarantine::check(uint64_t address, uint64_t length, const char *site) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto &entry : items_) {
    const Item &item = entry.second;
    if (item.address >= address + length || address >= item.address + item.length) continue;
    return make_failure(KVL_BUSY, site,
                        "%" PRIu64 " bytes at %#" PRIx64
                        " may still be written: %s. The memory is kept; do not free it",
                        item.length, item.address, item.why.c_str());
  }
  return {};
}

uint64_t Quarantine::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint64_t sum = 0;
  for (const auto &entry : items_) sum += entry.second.length;
  return sum;
}

}  // namespace kvlink::ascend
