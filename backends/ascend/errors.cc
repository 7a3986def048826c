#include "ascend/errors.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "ascend/acl.h"

namespace kvlink::ascend {
namespace {

const CatalogueEntry kEntries[] = {
#define KVLINK_ERROR(vendor, code, call, name, status, meaning, fix) \
  {Vendor::vendor, code, call, name, status, meaning, fix},
#define KVLINK_ERROR_TEXT(code, meaning, fix)
#include "ascend/errors.inc"
#undef KVLINK_ERROR
#undef KVLINK_ERROR_TEXT
};

const TextEntry kTexts[] = {
#define KVLINK_ERROR(vendor, code, call, name, status, meaning, fix)
#define KVLINK_ERROR_TEXT(code, meaning, fix) {code, meaning, fix},
#include "ascend/errors.inc"
#undef KVLINK_ERROR
#undef KVLINK_ERROR_TEXT
};

// Codes of ACL stand in ranges of families where single ones are not listed: graph capture.
constexpr int64_t kFirstCapture = 107024, kLastCapture = 107041;

const CatalogueEntry *find_exact(Vendor vendor, int64_t code, const char *call) {
  for (const CatalogueEntry &entry : kEntries) {
    if (entry.vendor == vendor && entry.code == code && std::strcmp(entry.call, call) == 0) return &entry;
  }
  return nullptr;
}

}  // namespace

const CatalogueEntry *find_entry(Vendor vendor, int64_t code, const char *call) {
  if (vendor == Vendor::kAcl && code > kFirstCapture && code <= kLastCapture) code = kFirstCapture;
  if (const CatalogueEntry *entry = find_exact(vendor, code, call)) return entry;
  if (const CatalogueEntry *entry = find_exact(vendor, code, "")) return entry;
  // HIXL passes ACL's codes on unchanged.
  return vendor == Vendor::kHixl ? find_entry(Vendor::kAcl, code, call) : nullptr;
}

const TextEntry *find_text_entry(const char *message) {
  const char *at = std::strstr(message, "EI0");
  for (; at != nullptr; at = std::strstr(at + 1, "EI0")) {
    for (const TextEntry &entry : kTexts) {
      if (std::strncmp(at, entry.code, std::strlen(entry.code)) == 0) return &entry;
    }
  }
  return nullptr;
}

const CatalogueEntry *catalogue(size_t *count) {
  *count = sizeof kEntries / sizeof kEntries[0];
  return kEntries;
}

const TextEntry *text_catalogue(size_t *count) {
  *count = sizeof kTexts / sizeof kTexts[0];
  return kTexts;
}

Failure vendor_failure(const AclApi *acl, Vendor vendor, const char *call, int64_t code, const char *format, ...) {
  // Asked first: the vendor's message of this thread is the last call's.
  const std::string said = acl == nullptr ? std::string() : acl->recent_message();
  char what[200];
  va_list args;
  va_start(args, format);
  std::vsnprintf(what, sizeof what, format, args);
  va_end(args);
  const CatalogueEntry *entry = find_entry(vendor, code, call);
  const TextEntry *text = find_text_entry(said.c_str());
  Failure failure;
  failure.status = entry == nullptr ? static_cast<kvl_status>(KVL_INTERNAL) : entry->status;
  failure.code = code;
  failure.site = call;
  if (entry == nullptr) {
    failure.message = std::string(what) + ": " + std::to_string(code) +
                      ", a code that kvlink does not know; look at the newest file in ~/ascend/log";
  } else {
    failure.message = std::string(what) + ": " + std::to_string(code) + " " + entry->name + ", " +
                      (text == nullptr ? entry->meaning : text->meaning) +
                      ". Fix: " + (text == nullptr ? entry->fix : text->fix);
  }
  if (!said.empty()) failure.message += " [" + said + "]";
  return failure;
}

bool hixl_recoverable(int64_t code) {
  return code == 103900 || code == 103902 || code == 103903 || code == 103905 || code == 203900;
}

}  // namespace kvlink::ascend
