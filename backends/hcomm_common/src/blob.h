// What the two sides of a link tell each other about themselves. The core carries these bytes; they are untrusted.
#ifndef KVLINK_HCOMM_BLOB_H
#define KVLINK_HCOMM_BLOB_H

#include <cstdint>

#include "ascend/staging.h"

namespace kvlink::hcomm {

using ascend::Failure;

constexpr uint32_t kWireVersion = 1;

struct LinkBlob {
  static constexpr uint32_t kMagic = 0x4c434b48;  // "HKCL"
  uint32_t magic;
  uint32_t version;
  uint32_t flavour;      // enum ascend::HcclFlavour: both sides must make their communicator the same way
  uint32_t family;       // enum ascend::SocFamily
  uint32_t intra_roce;   // HCCL_INTRA_ROCE_ENABLE decided, 0 or 1
  uint32_t link_option;  // enum ascend::LinkOption
  uint32_t device_port;  // 0 = the vendor's default
  int32_t physical_id;
  uint32_t regions;         // that this side will bind
  uint32_t reserved;        // 0
  uint64_t sequence;        // regions with a higher one came too late for this link
  uint64_t unaligned;       // a device region whose start is no multiple of 2 MiB; 0 when there is none
  int64_t super_device_id;  // -1 when there is none
  int64_t super_pod_id;     // -1 when there is none
  char server_id[64];
  char device_ip[64];
  char soc[64];
  char cann[64];
  ascend::StagingBlob staging;
};
static_assert(sizeof(LinkBlob) == 72 + 4 * 64 + sizeof(ascend::StagingBlob), "a wire struct has no padding");

// Checks size, version and every field that is used later.
Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob);

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_BLOB_H
