// What HIXL checks before a transfer, and the bounce path of its buffer pool (rule 28; off with BufferPool=0:0).
#pragma once

#include <vector>

#include "hixl_abi.h"
#include "hixl_channel.h"

namespace cann_sim::hixl_sim {

class Engine;

// Null addresses are 103900; so is an empty list from 9.1 on in TransferSync.
void check_descs(const std::vector<hixl::TransferOpDesc> &descs, bool sync);
// True for the statuses after which only disconnect and connect help.
bool link_fatal(hixl::Status status);

// With a pool: anything unregistered bounces, and in 8.5 anything shorter than 256 KiB too.
bool needs_pool(Engine &engine, const Channel &channel, const std::vector<hixl::TransferOpDesc> &descs);
void bounce(Engine &engine, Channel &channel, bool put, const std::vector<hixl::TransferOpDesc> &descs,
            const Deadline &deadline);
// One copy between a pool buffer and any address, by what the engine believes the address to be.
void pool_copy(Engine &engine, std::uint64_t pool, std::uint64_t address, std::uint64_t bytes, bool into_pool);

}  // namespace cann_sim::hixl_sim
