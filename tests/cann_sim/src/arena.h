// What memory.cc, host_memory.cc and copy.cc share: where the bytes behind an address really are.
#pragma once

#include <cstdint>

#include "memory.h"

namespace cann_sim {

// The hidden address of [address, +bytes) of device memory, or 0 when that is no part of one live allocation.
uint64_t hidden_address(uint64_t address, uint64_t bytes);
// Device memory only: the live allocation around an address; false when none. *freed: inside the arena, not allocated.
bool locate_device(uint64_t address, Located *located, bool *freed);
// Host memory only.
bool locate_host(uint64_t address, Located *located);

}  // namespace cann_sim
