#include "topology.h"

#include <cinttypes>
#include <cstring>

#include "ascend/rank_table.h"
#include "kvlink/provider.h"

namespace kvlink::hcomm {
namespace {

using ascend::LinkType;
using ascend::make_failure;

constexpr char kSite[] = "link_connect";

ascend::LinkSide side_of(const LinkBlob &blob) {
  ascend::LinkSide side;
  side.soc = static_cast<ascend::SocFamily>(blob.family);
  side.option = static_cast<ascend::LinkOption>(blob.link_option);
  side.intra_roce = blob.intra_roce != 0;
  side.server_id = blob.server_id;
  side.super_pod_id = blob.super_pod_id;
  return side;
}

ascend::Rank rank_of(const LinkBlob &blob) {
  ascend::Rank rank;
  rank.server_id = blob.server_id;
  rank.device_id = blob.physical_id;
  rank.device_ip = blob.device_ip;
  rank.device_port = static_cast<uint16_t>(blob.device_port);
  rank.super_device_id = blob.super_device_id;
  rank.super_pod_id = blob.super_pod_id;
  return rank;
}

Failure check_alike(const LinkBlob &self, const LinkBlob &peer) {
  if (self.flavour != peer.flavour) {
    return make_failure(KVL_REMOTE, kSite,
                        "one side has the process-wide memory functions of HCCL, the other only those of a communicator"
                        " (CANN %s here, %s at the peer): install the same CANN on both",
                        self.cann, peer.cann);
  }
  if (self.cann[0] != '\0' && peer.cann[0] != '\0' && std::strcmp(self.cann, peer.cann) != 0) {
    return make_failure(KVL_REMOTE, kSite,
                        "CANN is %s here and %s at the peer; HCCL's exchange between versions is not defined: install "
                        "the same CANN on both",
                        self.cann, peer.cann);
  }
  if (std::strcmp(self.server_id, peer.server_id) == 0 && self.physical_id == peer.physical_id) {
    return make_failure(KVL_INVALID, kSite,
                        "both sides use physical NPU %d of server %s; HCCL connects two devices: open the channels on "
                        "different ones (or set option server_id where two hosts have the same address)",
                        self.physical_id, self.server_id);
  }
  return {};
}

Failure check_alignment(const LinkBlob &blob, const char *whose) {
  if (blob.unaligned == 0) return {};
  return make_failure(KVL_INVALID, kSite,
                      "the link is HCCS, which moves device memory that starts at a multiple of 2 MiB; %s region at "
                      "%#" PRIx64
                      " does not: allocate it with Channel.allocate, or set HCCL_INTRA_ROCE_ENABLE=1 on "
                      "both sides",
                      whose, blob.unaligned);
}

Failure check_super_pod(const LinkBlob &self, const LinkBlob &peer) {
  const bool pods = static_cast<ascend::SocFamily>(self.family) == ascend::SocFamily::kA3;
  if (!pods || (self.super_device_id >= 0 && peer.super_device_id >= 0)) return {};
  return make_failure(KVL_UNSUPPORTED, kSite,
                      "the link is HCCS between A3 devices, for which HCCL needs their super_device_id, and CANN %s "
                      "does not tell it (aclrtGetDeviceInfo): set option super_device_id on both sides (SDID in "
                      "`npu-smi info -t spod-info`), or HCCL_INTRA_ROCE_ENABLE=1",
                      self.cann);
}

Failure check_addresses(const LinkBlob &self, const LinkBlob &peer) {
  if (self.device_ip[0] == '\0' || peer.device_ip[0] == '\0') {
    const LinkBlob &blob = self.device_ip[0] == '\0' ? self : peer;
    return make_failure(KVL_INVALID, kSite,
                        "the link is RoCE, and the address of %s NPU (physical id %d) is unknown: mount /etc/hccn.conf "
                        "into its container, or set option device_ip",
                        self.device_ip[0] == '\0' ? "this side's" : "the peer's", blob.physical_id);
  }
  if (std::strcmp(self.device_ip, peer.device_ip) == 0) {
    return make_failure(KVL_INVALID, kSite, "both NPUs claim the address %s: check /etc/hccn.conf and option device_ip",
                        self.device_ip);
  }
  return {};
}

}  // namespace

Failure plan_link(const LinkBlob &self, const LinkBlob &peer, uint32_t role, Topology *topology) {
  Failure failure = check_alike(self, peer);
  if (!failure.ok()) return failure;
  failure = ascend::agree_on_link(side_of(self), side_of(peer), &topology->link);
  if (!failure.ok()) return failure;
  if (topology->link == LinkType::kHccs) {
    failure = check_alignment(self, "this side's");
    if (failure.ok()) failure = check_alignment(peer, "the peer's");
    if (failure.ok()) failure = check_super_pod(self, peer);
  } else {
    failure = check_addresses(self, peer);
  }
  if (!failure.ok()) return failure;
  const bool initiator = role == KVL_ROLE_INITIATOR;
  topology->rank = initiator ? 0 : 1;
  topology->peer_rank = initiator ? 1 : 0;
  topology->peer_regions = peer.regions;
  const ascend::Rank ranks[2] = {rank_of(initiator ? self : peer), rank_of(initiator ? peer : self)};
  const bool pods = static_cast<ascend::SocFamily>(self.family) == ascend::SocFamily::kA3;
  return ascend::make_rank_table(pods ? ascend::RankTableVersion::k1_2 : ascend::RankTableVersion::k1_0, ranks,
                                 &topology->rank_table);
}

}  // namespace kvlink::hcomm
