// What peers are told: where this engine is, and what a region is. The core carries these bytes; they are untrusted.
#ifndef KVLINK_HOST_BLOB_H
#define KVLINK_HOST_BLOB_H

#include <array>
#include <cstdint>
#include <string>

#include "failure.h"
#include "memory.h"
#include "options.h"

namespace kvlink::host {

constexpr uint32_t kWireVersion = 1;

struct LinkBlob {
  static constexpr uint32_t kMagic = 0x4c4b5648;  // "HVKL"
  uint32_t magic;
  uint32_t version;
  uint32_t forced_path;  // enum Path
  uint16_t port;
  uint16_t reserved;
  char boot_id[40];     // /proc/sys/kernel/random/boot_id: the same kernel, so perhaps the same Unix sockets
  char local_name[48];  // abstract Unix socket; empty if there is none
  char host[256];
};
static_assert(sizeof(LinkBlob) == 360, "a wire struct has no padding");

struct RegionBlob {
  static constexpr uint32_t kMagic = 0x524b5648;  // "HVKR"
  uint32_t magic;
  uint32_t version;
  uint32_t mem;  // the exporter's handle
  uint32_t access;
  uint64_t length;
  uint64_t address;  // in the exporter's address space
  uint32_t shared;   // 1: peers may ask for its descriptor
  uint32_t reserved;
};
static_assert(sizeof(RegionBlob) == 40, "a wire struct has no padding");

std::string read_boot_id();

LinkBlob make_link_blob(const Options &options, uint16_t port, const std::string &boot_id,
                        const std::string &local_name);
RegionBlob make_region_blob(const Region &region);

// Check size, version and every field that is used later.
Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob);
Failure parse_region_blob(const void *data, uint64_t length, RegionBlob *blob);

// The two-call idiom of link_describe and mem_export.
Failure export_bytes(const void *blob, uint64_t size, void *buffer, uint64_t *length, const char *site);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_BLOB_H
