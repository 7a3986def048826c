// The JSON that tells HCCL who the two ranks of a communicator are. Both sides must pass the same bytes.
#ifndef KVLINK_ASCEND_RANK_TABLE_H
#define KVLINK_ASCEND_RANK_TABLE_H

#include <cstdint>
#include <string>

#include "ascend/library.h"

namespace kvlink::ascend {

struct Rank {
  std::string server_id;         // equality decides "same server" on A2; at most 64 characters
  std::string host_ip;           // optional
  int32_t device_id = 0;         // physical
  std::string device_ip;         // empty only for HCCS
  uint16_t device_port = 0;      // 0: the vendor's default
  int64_t super_device_id = -1;  // version 1.2
  int64_t super_pod_id = -1;     // version 1.2
};

enum class RankTableVersion { k1_0, k1_2 };  // k1_2: A3 super-pods

// Ranks 0 and 1. INVALID when a field breaks a rule of the vendor's parser, naming it.
Failure make_rank_table(RankTableVersion version, const Rank (&ranks)[2], std::string *json);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_RANK_TABLE_H
