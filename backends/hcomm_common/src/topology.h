// What two sides agree on before any vendor call: the link between their devices, and the table of the two ranks.
#ifndef KVLINK_HCOMM_TOPOLOGY_H
#define KVLINK_HCOMM_TOPOLOGY_H

#include <string>

#include "ascend/link_type.h"
#include "blob.h"

namespace kvlink::hcomm {

struct Topology {
  ascend::LinkType link = ascend::LinkType::kRoce;
  uint32_t rank = 0;  // ours; the initiator is rank 0
  uint32_t peer_rank = 1;
  uint32_t peer_regions = 0;
  std::string rank_table;  // the same bytes on both sides
};

// Refuses everything that would otherwise end in a time-out or in a vendor error much later.
Failure plan_link(const LinkBlob &self, const LinkBlob &peer, uint32_t role, Topology *topology);

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_TOPOLOGY_H
