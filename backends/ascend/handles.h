// Objects under the core's handles: a dense table by index, checked by the whole handle, read without exclusion.
#ifndef KVLINK_ASCEND_HANDLES_H
#define KVLINK_ASCEND_HANDLES_H

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "kvlink/provider.h"

namespace kvlink::ascend {

// T has a member `uint32_t handle`.
template <typename T>
class HandleTable {
 public:
  static constexpr uint32_t kIndexMask = (1u << KVL_HANDLE_INDEX_BITS) - 1;

  // Holds the table still; keep it for no longer than one batch.
  class Reader {
   public:
    explicit Reader(const HandleTable &table) : table_(table), lock_(table.mutex_) {}
    // Null when nothing is open under exactly this handle. Valid while the reader lives.
    const T *find(uint32_t handle) {
      if (last_ != nullptr && last_->handle == handle) return last_;
      return last_ = table_.lookup(handle);
    }

   private:
    const HandleTable &table_;
    std::shared_lock<std::shared_mutex> lock_;
    const T *last_ = nullptr;
  };

  // False when its index is taken.
  bool insert(std::shared_ptr<T> item) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    const uint32_t index = item->handle & kIndexMask;
    if (index >= items_.size()) items_.resize(index + 1);
    if (items_[index] != nullptr) return false;
    items_[index] = std::move(item);
    return true;
  }
  std::shared_ptr<T> get(uint32_t handle) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    return lookup(handle) == nullptr ? nullptr : items_[handle & kIndexMask];
  }
  std::shared_ptr<T> erase(uint32_t handle) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    std::shared_ptr<T> gone;
    if (lookup(handle) != nullptr) gone.swap(items_[handle & kIndexMask]);
    return gone;
  }
  template <typename Visit>
  void each(Visit visit) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    for (const std::shared_ptr<T> &item : items_) {
      if (item != nullptr) visit(item);
    }
  }

 private:
  const T *lookup(uint32_t handle) const {
    const uint32_t index = handle & kIndexMask;
    if (index >= items_.size()) return nullptr;
    const T *item = items_[index].get();
    return item != nullptr && item->handle == handle ? item : nullptr;
  }

  mutable std::shared_mutex mutex_;
  std::vector<std::shared_ptr<T>> items_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_HANDLES_H
