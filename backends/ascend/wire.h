// Untrusted bytes from the peer: fixed structs, checked before any field is used.
#ifndef KVLINK_ASCEND_WIRE_H
#define KVLINK_ASCEND_WIRE_H

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "ascend/library.h"

namespace kvlink::ascend {

template <size_t kSize>
void put_text(char (&out)[kSize], const std::string &text) {
  std::snprintf(out, kSize, "%s", text.c_str());
}

// Whether a text of the wire ends inside its field.
template <size_t kSize>
bool ends(const char (&text)[kSize]) {
  return std::memchr(text, 0, kSize) != nullptr;
}

// Copies the bytes into a wire struct that has `magic`, `version` and a constant kMagic, and checks those. `provider`
// is named in messages.
template <typename Blob>
Failure check_frame(const void *data, uint64_t length, uint32_t wire_version, const char *provider, const char *site,
                    Blob *blob) {
  if (data == nullptr || length != sizeof(Blob)) {
    return make_failure(KVL_INVALID, site,
                        "the peer's description has %" PRIu64
                        " bytes; expected %zu: install the same kvlink on both "
                        "sides",
                        length, sizeof(Blob));
  }
  std::memcpy(blob, data, sizeof(Blob));
  if (blob->magic != Blob::kMagic) {
    return make_failure(KVL_INVALID, site, "the peer's description is not one of the %s provider's", provider);
  }
  if (blob->version != wire_version) {
    return make_failure(KVL_INVALID, site, "the peer speaks %s wire version %u, this side %u: install the same version",
                        provider, blob->version, wire_version);
  }
  return {};
}

// The two-call idiom of link_describe and mem_export.
Failure export_bytes(const void *blob, uint64_t size, void *buffer, uint64_t *length, const char *site);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_WIRE_H
