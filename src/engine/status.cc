#include "status.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace kvlink {
namespace {

// A cut in the middle of a UTF-8 sequence would make the text undecodable, so back up to its first byte.
void trim_partial_utf8(char *text, uint64_t length) noexcept {
  uint64_t start = length;
  while (start > 0 && (static_cast<unsigned char>(text[start - 1]) & 0xC0u) == 0x80u) --start;
  if (start == 0) return;
  const auto lead = static_cast<unsigned char>(text[start - 1]);
  const uint64_t want = lead >= 0xF0u ? 4 : lead >= 0xE0u ? 3 : lead >= 0xC0u ? 2 : 1;
  if (length - (start - 1) < want) text[start - 1] = '\0';
}

void format_list(char *to, uint64_t room, const char *format, va_list list) noexcept {
  const int written = std::vsnprintf(to, room, format, list);
  if (written < 0) {
    to[0] = '\0';
  } else if (static_cast<uint64_t>(written) >= room) {
    trim_partial_utf8(to, room - 1);
  }
}

kvl_status fill(kvl_error *err, kvl_status status, const char *site, int64_t vendor_code, const char *format,
                va_list list) noexcept {
  if (err == nullptr || err->struct_size < sizeof(kvl_error)) return status;
  err->status = status;
  err->vendor_code = vendor_code;
  copy_text(err->site, sizeof err->site, site);
  format_list(err->message, sizeof err->message, format, list);
  return status;
}

}  // namespace

kvl_status fail(kvl_error *err, kvl_status status, const char *format, ...) {
  va_list list;
  va_start(list, format);
  fill(err, status, "", 0, format, list);
  va_end(list);
  return status;
}

kvl_status fail_at(kvl_error *err, kvl_status status, const char *site, int64_t vendor_code, const char *format, ...) {
  va_list list;
  va_start(list, format);
  fill(err, status, site, vendor_code, format, list);
  va_end(list);
  return status;
}

void copy_text(char *to, uint64_t room, const char *from) noexcept {
  if (room == 0) return;
  const uint64_t length = from == nullptr ? 0 : strnlen(from, room);
  const uint64_t kept = length < room ? length : room - 1;
  if (kept > 0) std::memmove(to, from, kept);
  to[kept] = '\0';
  if (length == room) trim_partial_utf8(to, kept);
}

void format_text(char *to, uint64_t room, const char *format, ...) noexcept {
  va_list list;
  va_start(list, format);
  format_list(to, room, format, list);
  va_end(list);
}

const char *status_name(kvl_status status) noexcept {
  static const char *const names[] = {"OK",          "DONE",        "AGAIN",       "INVALID",    "STATE",   "BUSY",
                                      "UNSUPPORTED", "UNAVAILABLE", "NO_RESOURCE", "DENIED",     "TIMEOUT", "CANCELLED",
                                      "INTERNAL",    "REMOTE",      "LINK_DOWN",   "ENGINE_DOWN"};
  if (status < 0 || status >= static_cast<kvl_status>(sizeof names / sizeof names[0])) return "UNKNOWN";
  return names[status];
}

bool is_failure_status(kvl_status status) noexcept { return status >= KVL_AGAIN && status <= KVL_ENGINE_DOWN; }

kvl_status ProviderError::pass(kvl_status status, const char *call, const char *provider, kvl_error *err) noexcept {
  error.site[sizeof error.site - 1] = '\0';
  error.message[sizeof error.message - 1] = '\0';
  if (!is_failure_status(status)) {
    format_text(error.message, sizeof error.message, "provider '%s': %s returned %d, which is no failure it may report",
                provider, call, static_cast<int>(status));
    status = KVL_INTERNAL;
  } else if (error.message[0] == '\0') {
    format_text(error.message, sizeof error.message, "provider '%s': %s failed with %s and gave no reason", provider,
                call, status_name(status));
  }
  error.status = status;
  if (error.site[0] == '\0') copy_text(error.site, sizeof error.site, call);
  if (err != nullptr && err->struct_size >= sizeof(kvl_error)) {
    const uint32_t size = err->struct_size;
    *err = error;
    err->struct_size = size;
  }
  return status;
}

}  // namespace kvlink
