// Finished tags on their way to poll.
#ifndef KVLINK_ASCEND_COMPLETIONS_H
#define KVLINK_ASCEND_COMPLETIONS_H

#include <cstdint>
#include <deque>
#include <mutex>

#include "ascend/library.h"

namespace kvlink::ascend {

class CompletionQueue {
 public:
  void push(const kvl_completion &completion);
  // A finished transfer: OK with `bytes`, or what went wrong.
  void push(uint64_t tag, uint32_t path, uint64_t bytes, const Failure &failure);
  // Takes up to *count; *left when more wait.
  void take(kvl_completion *completions, uint32_t *count, bool *left);
  bool empty() const;

 private:
  mutable std::mutex mutex_;
  std::deque<kvl_completion> queue_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_COMPLETIONS_H
