#include "failure.h"

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace kvlink::host {
namespace {

std::string format_text(const char *format, va_list args) {
  char text[448];
  std::vsnprintf(text, sizeof text, format, args);
  return text;
}

template <size_t kSize>
void copy_text(char (&out)[kSize], const std::string &text) {
  const size_t length = text.size() < kSize - 1 ? text.size() : kSize - 1;
  std::memcpy(out, text.data(), length);
  out[length] = '\0';
}

}  // namespace

Failure make_failure(kvl_status status, const char *site, const char *format, ...) {
  va_list args;
  va_start(args, format);
  Failure failure{status, 0, site, format_text(format, args)};
  va_end(args);
  return failure;
}

Failure errno_failure(kvl_status status, int error, const char *site, const char *format, ...) {
  va_list args;
  va_start(args, format);
  Failure failure{status, error, site, format_text(format, args)};
  va_end(args);
  char text[128];
  // The GNU variant: returns the text, which need not be in the buffer.
  failure.message += std::string(": ") + strerror_r(error, text, sizeof text);
  return failure;
}

kvl_status report(const Failure &failure, kvl_error *err) {
  if (err != nullptr && err->struct_size >= sizeof(kvl_error)) {
    err->status = failure.status;
    err->vendor_code = failure.code;
    copy_text(err->site, failure.site);
    copy_text(err->message, failure.message);
  }
  return failure.status;
}

void report(const Failure &failure, kvl_completion *completion) {
  completion->status = failure.status;
  completion->vendor_code = failure.code;
  copy_text(completion->site, failure.site);
  copy_text(completion->message, failure.message);
}

}  // namespace kvlink::host
