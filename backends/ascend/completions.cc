#include "ascend/completions.h"

#include <cstring>

namespace kvlink::ascend {

void CompletionQueue::push(const kvl_completion &completion) {
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(completion);
}

void CompletionQueue::push(uint64_t tag, uint32_t path, uint64_t bytes, const Failure &failure) {
  kvl_completion completion;
  std::memset(&completion, 0, sizeof completion);
  completion.tag = tag;
  completion.path = path;
  completion.bytes = bytes;
  if (!failure.ok()) report(failure, &completion);
  push(completion);
}

void CompletionQueue::take(kvl_completion *completions, uint32_t *count, bool *left) {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint32_t taken = 0;
  while (taken < *count && !queue_.empty()) {
    completions[taken++] = queue_.front();
    queue_.pop_front();
  }
  *count = taken;
  *left = !queue_.empty();
}

bool CompletionQueue::empty() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty();
}

}  // namespace kvlink::ascend
