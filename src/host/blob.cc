#include "blob.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>

namespace kvlink::host {
namespace {

template <size_t kSize>
void put_text(char (&out)[kSize], const std::string &text) {
  std::snprintf(out, kSize, "%s", text.c_str());
}

template <size_t kSize>
bool ends(const char (&text)[kSize]) {
  return std::memchr(text, 0, kSize) != nullptr;
}

template <typename Blob>
Failure check_frame(const void *data, uint64_t length, const char *site, Blob *blob) {
  if (data == nullptr || length != sizeof(Blob)) {
    return make_failure(KVL_INVALID, site, "the peer's description has %" PRIu64 " bytes; expected %zu", length,
                        sizeof(Blob));
  }
  std::memcpy(blob, data, sizeof(Blob));
  if (blob->magic != Blob::kMagic) {
    return make_failure(KVL_INVALID, site, "the peer's description is not one of the host provider's");
  }
  if (blob->version != kWireVersion) {
    return make_failure(KVL_INVALID, site, "the peer speaks host wire version %u, this side %u", blob->version,
                        kWireVersion);
  }
  return {};
}

}  // namespace

std::string read_boot_id() {
  char text[40] = {};
  FILE *file = std::fopen("/proc/sys/kernel/random/boot_id", "re");
  if (file == nullptr) return {};
  const bool read = std::fgets(text, sizeof text, file) != nullptr;
  std::fclose(file);
  if (!read) return {};
  text[std::strcspn(text, "\n")] = '\0';
  return text;
}

LinkBlob make_link_blob(const Options &options, uint16_t port, const std::string &boot_id,
                        const std::string &local_name) {
  LinkBlob blob{};
  blob.magic = LinkBlob::kMagic;
  blob.version = kWireVersion;
  blob.forced_path = static_cast<uint32_t>(options.path);
  blob.port = port;
  put_text(blob.boot_id, boot_id);
  put_text(blob.local_name, local_name);
  put_text(blob.host, options.advertise_host);
  return blob;
}

RegionBlob make_region_blob(const Region &region) {
  RegionBlob blob{};
  blob.magic = RegionBlob::kMagic;
  blob.version = kWireVersion;
  blob.mem = region.mem;
  blob.access = region.access;
  blob.length = region.length;
  blob.address = reinterpret_cast<uint64_t>(region.base);
  blob.shared = region.shared ? 1 : 0;
  return blob;
}

Failure parse_link_blob(const void *data, uint64_t length, LinkBlob *blob) {
  const Failure failure = check_frame(data, length, "link_connect", blob);
  if (!failure.ok()) return failure;
  if (!ends(blob->boot_id) || !ends(blob->local_name) || !ends(blob->host)) {
    return make_failure(KVL_INVALID, "link_connect", "a text in the peer's description does not end");
  }
  if (blob->forced_path > static_cast<uint32_t>(Path::kAuto) || blob->port == 0 || blob->host[0] == '\0') {
    return make_failure(KVL_INVALID, "link_connect", "the peer's description has path %u, port %u, host '%.60s'",
                        blob->forced_path, static_cast<unsigned>(blob->port), blob->host);
  }
  return {};
}

Failure parse_region_blob(const void *data, uint64_t length, RegionBlob *blob) {
  const Failure failure = check_frame(data, length, "rmem_open", blob);
  if (!failure.ok()) return failure;
  if (blob->length == 0 || blob->address == 0 || blob->address + blob->length < blob->address || blob->shared > 1 ||
      (blob->access & ~uint32_t{KVL_ACCESS_READ | KVL_ACCESS_WRITE}) != 0) {
    return make_failure(KVL_INVALID, "rmem_open",
                        "the peer describes a region at %#" PRIx64 " with %" PRIu64 " bytes and access %#x",
                        blob->address, blob->length, blob->access);
  }
  return {};
}

Failure export_bytes(const void *blob, uint64_t size, void *buffer, uint64_t *length, const char *site) {
  const bool fits = buffer != nullptr && *length >= size;
  *length = size;
  if (!fits) return make_failure(KVL_NO_RESOURCE, site, "the description needs %" PRIu64 " bytes", size);
  std::memcpy(buffer, blob, size);
  return {};
}

}  // namespace kvlink::host
