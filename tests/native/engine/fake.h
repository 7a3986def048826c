// The scripted provider's controls, shared between the provider library and the tests.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "kvlink/provider.h"

enum class Submit : int {
  kInline,  // moves the bytes and answers DONE
  kLater,   // moves the bytes; the next poll completes it
  kHold,    // completes when the test calls release_held, when cancelled (if honoured), or in link_close
};

// What the provider does and what it saw. Behaviour may be changed at any time; `mutex` guards the containers.
struct FakeControl {
  // Read by engine_open and engine_query.
  std::atomic<uint64_t> caps{KVL_CAP_PUT | KVL_CAP_GET | KVL_CAP_ACCEPTOR_SUBMIT | KVL_CAP_LATE_MEMORY |
                             KVL_CAP_ALLOCATE | KVL_CAP_COPY | KVL_CAP_CANCEL | KVL_CAP_INTERRUPT | KVL_CAP_LINK_CHECK |
                             KVL_CAP_STATISTICS};
  std::atomic<uint64_t> alignment{1}, memory_alignment{1}, max_ranges{0}, max_range_bytes{0};
  std::atomic<uint32_t> max_links{0}, max_connects{4}, connect_mode{KVL_CONNECT_INITIATOR};
  std::atomic<bool> grouped{false};
  // Behaviour.
  std::atomic<Submit> submit{Submit::kInline};
  std::atomic<int> again{0};               // so many submits answer AGAIN first
  std::atomic<int> submit_status{KVL_OK};  // a failure that submit answers
  std::atomic<int> completion{KVL_OK};     // the status of completions from poll or DONE
  std::atomic<int> engine_open_status{KVL_OK}, mem_open_status{KVL_OK}, mem_close_status{KVL_OK};
  std::atomic<int> link_open_status{KVL_OK}, connect_status{KVL_OK}, rmem_open_status{KVL_OK};
  std::atomic<int> check_status{KVL_OK}, poll_status{KVL_OK};
  std::atomic<bool> honour_cancel{true}, silent_failures{false}, lose_on_close{false};
  std::atomic<bool> hang_wait{false}, hang_poll{false}, hang_link_close{false}, hang_engine_close{false};
  std::atomic<bool> hang_connect{false}, hang_submit{false}, hang_mem_copy{false};
  std::atomic<bool> deaf_wait{false};  // wait ends by timeout or wake only, never by work
  std::atomic<bool> discard{false};    // copy nothing: for the bench
  // What it saw.
  std::atomic<uint64_t> submits{0}, polls{0}, waits{0}, wakes{0}, cancels{0}, interrupts{0};
  std::atomic<uint64_t> link_opens{0}, link_closes{0}, rmem_opens{0}, rmem_closes{0}, mem_opens{0}, mem_closes{0};
  std::atomic<uint64_t> mem_allocs{0}, mem_frees{0}, engine_opens{0}, engine_closes{0}, hanging{0};

  std::mutex mutex;
  std::condition_variable unhang;
  std::vector<std::vector<kvl_range>> seen;  // the ranges of every accepted submit
  std::vector<std::string> violations;       // of the contract, by the engine
  bool record = true;

  void violate(const std::string &what) {
    std::lock_guard<std::mutex> lock(mutex);
    violations.push_back(what);
  }
};

// Exported by the provider library beside kvl_provider_init.
struct FakeApi {
  FakeControl *control;
  // Completes every held submit with `status`; returns how many there were.
  uint64_t (*release_held)(kvl_status status);
  // Completes one held submit; false when it is not held.
  bool (*end_held)(uint64_t tag, kvl_status status);
  uint64_t (*held)();
  // Makes poll return a completion for `tag` although no submit of that tag is due one.
  void (*inject)(uint64_t tag, kvl_status status);
  // The tag of the most recent submit.
  uint64_t (*last_tag)();
};
extern "C" FakeApi fake_api();
