// Faults changed while the process runs (testing.cc); looking them up is in call.h.
#pragma once

#include <cstdint>
#include <string>

namespace cann_sim {

void set_faults(const std::string &spec);
void release_hangs();
uint64_t hang_releases();  // how often release_hangs was called

}  // namespace cann_sim
