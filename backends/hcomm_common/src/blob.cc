#include "blob.h"

#include <cstring>

#include "ascend/hccl.h"
#include "ascend/wire.h"
#include "policy.h"

namespace kvlink::hcomm {
namespace {

constexpr uint32_t kMostRegions = 1u << KVL_HANDLE_INDEX_BITS;

// What a rank table may carry as it is: it goes into JSON between quotes.
template <size_t kSize>
bool plain(const char (&text)[kSize]) {
  if (!ascend::ends(text)) return false;
  for (const char *at = text; *at != '\0'; ++at) {
    if (*at < 0x20 || *at > 0x7e || *at == '"' || *at == '\\') return false;
  }
  return true;
}

}  // namespace

Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob) {
  const Failure failure = ascend::check_frame(data, length, kWireVersion, kPolicy.provider, "link_connect", blob);
  if (!failure.ok()) return failure;
  if (!plain(blob->server_id) || !plain(blob->device_ip) || !plain(blob->soc) || !plain(blob->cann)) {
    return ascend::make_failure(KVL_INVALID, "link_connect", "a text in the peer's description is not plain");
  }
  if (blob->server_id[0] == '\0' || blob->flavour > static_cast<uint32_t>(ascend::HcclFlavour::kPerCommunicator) ||
      blob->family > static_cast<uint32_t>(ascend::SocFamily::k950) || blob->intra_roce > 1 ||
      blob->link_option > static_cast<uint32_t>(ascend::LinkOption::kHccs) || blob->device_port > 65535 ||
      blob->physical_id < 0 || blob->regions > kMostRegions || blob->reserved != 0) {
    return ascend::make_failure(
        KVL_INVALID, "link_connect",
        "the peer's description has device %d, port %u, SoC family %u, flavour %u, link %u, %u regions",
        blob->physical_id, blob->device_port, blob->family, blob->flavour, blob->link_option, blob->regions);
  }
  return {};
}

}  // namespace kvlink::hcomm
