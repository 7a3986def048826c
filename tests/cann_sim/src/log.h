// Reading the counters (testing.cc), and whether anyone listens to the log.
#pragma once

#include <cstdint>
#include <string>

namespace cann_sim {

bool logging();
int64_t live(const std::string &name);
std::string live_json();

}  // namespace cann_sim
