// The error catalogue: vendor code -> name, meaning, likely cause and fix; the data is in errors.inc.
#ifndef KVLINK_ASCEND_ERRORS_H
#define KVLINK_ASCEND_ERRORS_H

#include <cstdint>

#include "ascend/library.h"

namespace kvlink::ascend {

struct AclApi;

enum class Vendor : uint32_t { kAcl, kHccl, kHixl };

struct CatalogueEntry {
  Vendor vendor;
  int64_t code;
  const char *call;  // the vendor call it applies to; "" = any
  const char *name;
  kvl_status status;
  const char *meaning;
  const char *fix;
};

// HCCL's user-level codes ("EI0006"), which stand in the vendor's message text and are more exact than the result.
struct TextEntry {
  const char *code;
  const char *meaning;
  const char *fix;
};

// The entry for this call if there is one, else the general one, else null.
const CatalogueEntry *find_entry(Vendor vendor, int64_t code, const char *call);
const TextEntry *find_text_entry(const char *message);

// The whole catalogue, for documentation and tests.
const CatalogueEntry *catalogue(size_t *count);
const TextEntry *text_catalogue(size_t *count);

// A failed vendor call as a Failure: site = `call`, code = `code`; the message is "<what>: <code> <NAME>, <meaning>.
// <fix> [<the vendor's own message>]". `acl` (may be null) is asked for this thread's message, so call it in the thread
// that made the vendor call, at once. The status is the catalogue's; INTERNAL for an unknown code.
Failure vendor_failure(const AclApi *acl, Vendor vendor, const char *call, int64_t code, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

// True for HIXL's statuses after which a link still works (every other one is fatal for it).
bool hixl_recoverable(int64_t code);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_ERRORS_H
