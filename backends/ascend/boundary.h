// What every provider's C boundary and wire structs need: nothing throws across, blobs in two calls, checked frames.
#ifndef KVLINK_ASCEND_BOUNDARY_H
#define KVLINK_ASCEND_BOUNDARY_H

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "ascend/library.h"

namespace kvlink::ascend {

inline kvl_status status_of(const Failure &failure, kvl_error *err) {
  return failure.ok() ? static_cast<kvl_status>(KVL_OK) : report(failure, err);
}

// Runs `call`, which returns a kvl_status; an exception becomes one.
template <typename Call>
kvl_status guarded(kvl_error *err, Call call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return report(Failure{KVL_NO_RESOURCE, 0, "allocate", "out of memory"}, err);
  } catch (const std::exception &error) {
    return report(make_failure(KVL_INTERNAL, "provider", "unexpected: %s", error.what()), err);
  } catch (...) {
    return report(Failure{KVL_INTERNAL, 0, "provider", "unexpected exception"}, err);
  }
}

template <typename Call>
void guarded_void(Call call) {
  static_cast<void>(guarded(nullptr, [&] {
    call();
    return static_cast<kvl_status>(KVL_OK);
  }));
}

// The two-call idiom of link_describe and mem_export.
inline Failure export_bytes(const void *blob, uint64_t size, void *buffer, uint64_t *length, const char *site) {
  const uint64_t room = *length;
  *length = size;
  if (buffer == nullptr || room < size) {
    return make_failure(KVL_NO_RESOURCE, site, "needs %" PRIu64 " bytes, got %" PRIu64, size, room);
  }
  std::memcpy(buffer, blob, size);
  return {};
}

template <size_t kSize>
void put_text(char (&out)[kSize], const std::string &text) {
  std::snprintf(out, kSize, "%s", text.c_str());
}

// Whether a text of the wire ends inside its field.
template <size_t kSize>
bool ends(const char (&text)[kSize]) {
  return std::memchr(text, 0, kSize) != nullptr;
}

// Copies untrusted bytes into a wire struct that has `magic`, `version` and a constant kMagic, and checks those.
template <typename Blob>
Failure check_frame(const void *data, uint64_t length, uint32_t wire_version, const char *provider, const char *site,
                    Blob *blob) {
  if (data == nullptr || length != sizeof(Blob)) {
    return make_failure(KVL_INVALID, site, "the peer's description has %" PRIu64 " bytes; expected %zu: does it run "
                        "the same kvlink?", length, sizeof(Blob));
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

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_BOUNDARY_H
