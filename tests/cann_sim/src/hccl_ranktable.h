// The rank table of HcclCommInitClusterInfoMemConfig: its JSON, its rules (12), and the link each pair of ranks gets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cann_sim::hccl {

enum class Family { a2, a3, other };
enum class Link : std::uint8_t { hccs = 0, roce = 1 };

struct Rank {
  std::string server_id;
  std::string pod_id;             // version 1.2 only
  int device_id = 0;              // physical
  std::string device_ip;          // first of a comma list; empty: not given
  std::uint16_t device_port = 0;  // 0: not given
  std::string super_device_id;    // version 1.2 only; empty: not given
};

struct RankTable {
  std::string version;
  std::vector<Rank> ranks;  // by rank_id
  std::uint64_t hash = 0;   // of the text: both sides must have passed the same

  Link link(std::uint32_t a, std::uint32_t b, Family family, bool roce_forced) const;
};

// Throws Refused(1) for a malformed or contradictory table and Refused(7) for rank ids that are not 0..n-1.
RankTable parse_rank_table(const char *text, Family family, bool roce_forced);

std::uint64_t fnv1a(const void *bytes, std::size_t size, std::uint64_t seed = 0xcbf29ce484222325ULL);

}  // namespace cann_sim::hccl
