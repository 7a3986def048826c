// Filling kvl_error and reading what providers wrote.
#pragma once

#include <cstdint>

#include "kvlink/provider.h"

namespace kvlink {

// Writes a failure into the caller's struct (if there is one) and returns `status`.
[[gnu::format(printf, 3, 4), gnu::cold]] kvl_status fail(kvl_error *err, kvl_status status, const char *format, ...);

// As fail(), with the call that failed and its raw code.
[[gnu::format(printf, 5, 6), gnu::cold]] kvl_status fail_at(kvl_error *err, kvl_status status, const char *site,
                                                            int64_t vendor_code, const char *format, ...);

// Copies text into a fixed field; always ends in NUL, never splits a UTF-8 sequence.
void copy_text(char *to, uint64_t room, const char *from) noexcept;

// Formats into a fixed field, with the same guarantees.
[[gnu::format(printf, 3, 4)]] void format_text(char *to, uint64_t room, const char *format, ...) noexcept;

const char *status_name(kvl_status status) noexcept;

// True for a status that a provider call may fail with (not OK, DONE or unknown numbers).
bool is_failure_status(kvl_status status) noexcept;

// An error struct that a provider writes into, handed on to the caller with the gaps filled.
struct ProviderError {
  kvl_error error{};
  ProviderError() { error.struct_size = sizeof(kvl_error); }

  // Completes what the provider wrote about a failed `call` and copies it to `err`. Returns the status to answer:
  // `status`, or INTERNAL when the provider may not return it.
  kvl_status pass(kvl_status status, const char *call, const char *provider, kvl_error *err) noexcept;
};

}  // namespace kvlink
