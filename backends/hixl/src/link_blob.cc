#include "link_blob.h"

#include <cinttypes>
#include <cstring>
#include <string>

#include "ascend/device.h"
#include "ascend/wire.h"

namespace kvlink::hixl_provider {
namespace {

using ascend::LinkSide;
using ascend::LinkType;
using ascend::make_failure;

constexpr const char *kSite = "link_connect";

LinkSide side_of(const LinkBlob &blob) {
  LinkSide side;
  side.soc = static_cast<ascend::SocFamily>(blob.soc);
  side.option = static_cast<ascend::LinkOption>(blob.link_option);
  side.intra_roce = blob.intra_roce != 0;
  side.server_id = blob.server;
  side.super_pod_id = blob.super_pod;
  return side;
}

Failure check_alignment(const LinkBlob &self, const LinkBlob &peer) {
  const uint64_t address = self.unaligned_device != 0 ? self.unaligned_device : peer.unaligned_device;
  if (address == 0) return {};
  return make_failure(KVL_INVALID, kSite,
                      "device memory at 0x%" PRIx64
                      " %s does not start at a multiple of 2 MiB, which this HCCS link "
                      "needs (Hixl::Connect would answer 503900): allocate it through the channel, align it, or use "
                      "RoCE (option link=roce with HCCL_INTRA_ROCE_ENABLE=1)",
                      address, self.unaligned_device != 0 ? "of this side" : "of the peer");
}

}  // namespace

Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob) {
  const Failure failure = ascend::check_frame(data, length, kWireVersion, "hixl", kSite, blob);
  if (!failure.ok()) return failure;
  using ascend::ends;
  if (!ends(blob->engine) || !ends(blob->server) || !ends(blob->cann) || !ends(blob->soc_name) ||
      blob->engine[0] == '\0' || blob->server[0] == '\0') {
    return make_failure(KVL_INVALID, kSite, "the peer's description has a text that does not end, or is missing");
  }
  if (blob->soc > static_cast<uint32_t>(ascend::SocFamily::k950) ||
      blob->link_option > static_cast<uint32_t>(ascend::LinkOption::kHccs)) {
    return make_failure(KVL_INVALID, kSite, "the peer names SoC family %u and link option %u, which do not exist",
                        blob->soc, blob->link_option);
  }
  return {};
}

Failure check_peers(const LinkBlob &self, const LinkBlob &peer, LinkType *type) {
  const bool same_server = std::strcmp(self.server, peer.server) == 0;
  if (std::strcmp(self.engine, peer.engine) == 0 || (same_server && self.device >= 0 && self.device == peer.device)) {
    return make_failure(KVL_INVALID, kSite,
                        "both sides are on NPU %d of %s, and HIXL connects two different ones: open one of the "
                        "channels on another device",
                        self.device, self.server);
  }
  if (self.cann[0] != '\0' && peer.cann[0] != '\0' && std::strcmp(self.cann, peer.cann) != 0) {
    return make_failure(KVL_INVALID, kSite,
                        "this side runs CANN %s and the peer CANN %s: memory descriptions of different versions do "
                        "not fit each other (EI0008); install the same CANN on both",
                        self.cann, peer.cann);
  }
  Failure failure = ascend::agree_on_link(side_of(self), side_of(peer), type);
  if (!failure.ok()) return failure;
  if (*type == LinkType::kHccs) return check_alignment(self, peer);
  if (self.has_device_address == 0 || peer.has_device_address == 0) {
    return make_failure(KVL_UNAVAILABLE, kSite,
                        "the RoCE address (device_ip) of NPU %d of %s is unknown, and this RoCE link needs it: mount "
                        "/etc/hccn.conf or hccn_tool there",
                        self.has_device_address == 0 ? self.device : peer.device,
                        self.has_device_address == 0 ? "this side" : "the peer");
  }
  return {};
}

}  // namespace kvlink::hixl_provider
