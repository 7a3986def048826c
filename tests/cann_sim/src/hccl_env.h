// The HCCL_* environment: parsed once a process, at the first communicator initialisation (rule 14).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace cann_sim::hccl {

struct Environment {
  bool roce = false;               // HCCL_INTRA_ROCE_ENABLE=1 decided
  int connect_timeout_s = 120;     // HCCL_CONNECT_TIMEOUT
  int exec_timeout_s = 1836;       // HCCL_EXEC_TIMEOUT
  int rdma_timeout_exponent = 20;  // HCCL_RDMA_TIMEOUT: one try waits 4.096 us * 2^n
  int rdma_retries = 7;            // HCCL_RDMA_RETRY_CNT
  // HCCL_NPU_SOCKET_PORT_RANGE: inclusive ranges; {0, 0} stands for "auto". Empty: not set.
  std::vector<std::pair<std::uint16_t, std::uint16_t>> port_ranges;

  // What RDMA retries before it reports a lost peer, in milliseconds, unscaled.
  std::int64_t retry_window_ms() const;
};

// The parsed environment; throws Refused(1) for a value or a combination that HCCL refuses. What the first call found
// (good or bad) is what every later call of the process gets.
const Environment &environment();

// The same without the memory, for tests of the parser. `get` answers like getenv.
Environment parse_environment(std::optional<std::string> (*get)(const char *name));

}  // namespace cann_sim::hccl
