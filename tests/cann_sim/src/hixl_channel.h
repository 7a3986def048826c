// One direction between two engines: the client's half, which transfers, or the server's, which only holds memory open.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "hixl_hccl.h"
#include "hixl_wire.h"

namespace cann_sim::hixl_sim {

using Clock = std::chrono::steady_clock;

struct Channel {
  std::string peer;  // the remote engine's name
  HcclLink link;
  Socket control;
  std::uint64_t remote_pool = 0;  // address and size of the server's buffer pool
  std::uint64_t remote_pool_bytes = 0;

  std::vector<Range> remote_memories;  // what the server had registered when this link was made

  std::mutex control_mutex;              // one request and its reply at a time
  std::mutex transfer_mutex;             // TransferSync on one link is serial
  std::atomic<bool> unavailable{false};  // after a link-fatal failure (9.1)
  std::atomic<std::int64_t> heard_ms{0};
  std::uint32_t sequence = 0;  // under control_mutex

  void heard() { heard_ms = now_ms(); }
  static std::int64_t now_ms() {
    return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch()).count();
  }
  // Sends a request and waits for its reply. Throws Refused like Socket.
  Frame ask(Frame request, const Deadline &deadline);
};

}  // namespace cann_sim::hixl_sim
