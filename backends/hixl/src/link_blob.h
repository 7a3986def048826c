// What one side tells the other before any vendor call is made. The core carries these bytes; they are untrusted.
#ifndef KVLINK_HIXL_LINK_BLOB_H
#define KVLINK_HIXL_LINK_BLOB_H

#include <cstdint>

#include "ascend/link_type.h"
#include "ascend/staging.h"

namespace kvlink::hixl_provider {

using ascend::Failure;

constexpr uint32_t kWireVersion = 1;

struct LinkBlob {
  static constexpr uint32_t kMagic = 0x4c584956;  // "VIXL"
  uint32_t magic;
  uint32_t version;
  uint32_t soc;          // enum SocFamily
  uint32_t link_option;  // enum LinkOption
  uint32_t intra_roce;   // what its environment asks for
  int32_t device;        // physical id; -1: unknown
  int64_t super_pod;
  uint64_t sequence;          // of its newest region when this was made
  uint64_t unaligned_device;  // address of registered device memory that an HCCS link refuses; 0: none
  uint32_t has_device_address;
  uint32_t reserved;
  char engine[64];  // "ip:port" of its vendor engine
  char server[48];  // its ip
  char cann[32];    // version; empty: unknown
  char soc_name[32];
  ascend::StagingBlob staging;
};
static_assert(sizeof(LinkBlob) == 56 + 64 + 48 + 32 + 32 + sizeof(ascend::StagingBlob), "a wire struct has no padding");

// Size, magic, version, and every field that is used later.
Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob);

// Everything that would fail later, or hang, refused before any vendor call: peers on different SoC families or CANN
// versions, contradictory environments, one device on both sides, a link whose kind cannot reach registered memory.
Failure check_peers(const LinkBlob &self, const LinkBlob &peer, ascend::LinkType *type);

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_LINK_BLOB_H
