#include "copy.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvlink::host {
namespace {

#if defined(__x86_64__)

constexpr size_t kLine = 64;
// The hardware prefetcher stops at a page's end; the head of the next piece is fetched by hand instead.
constexpr size_t kPrefetchAhead = 1024;

__attribute__((target("avx2"))) void stream_piece(char *to, const char *from, size_t length, const char *next) {
  const size_t head = std::min(length, (kLine - (reinterpret_cast<uintptr_t>(to) & (kLine - 1))) & (kLine - 1));
  if (head > 0) {
    std::memcpy(to, from, head);
    to += head, from += head, length -= head;
  }
  const size_t body = length / kLine * kLine;
  // The last lines of the body prefetch the head of the next piece, one line each.
  const size_t turn = body > kPrefetchAhead ? body - kPrefetchAhead : 0;
  size_t at = 0;
  for (; at < turn; at += kLine) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at + 32));
    _mm_prefetch(from + at + kPrefetchAhead, _MM_HINT_T0);
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at), a);
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at + 32), b);
  }
  for (; at < body; at += kLine) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at + 32));
    if (next != nullptr) _mm_prefetch(next + (at - turn), _MM_HINT_T0);
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at), a);
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at + 32), b);
  }
  if (length > body) std::memcpy(to + body, from + body, length - body);
}

bool can_stream() {
  static const bool able = __builtin_cpu_supports("avx2") != 0;
  return able;
}

bool copy_streaming(const iovec *to, const iovec *from, size_t count) {
  if (!can_stream()) return false;
  for (size_t i = 0; i < count; ++i) {
    const char *next = i + 1 < count ? static_cast<const char *>(from[i + 1].iov_base) : nullptr;
    if (next != nullptr && from[i + 1].iov_len < kPrefetchAhead) next = nullptr;
    stream_piece(static_cast<char *>(to[i].iov_base), static_cast<const char *>(from[i].iov_base), from[i].iov_len,
                 next);
  }
  _mm_sfence();  // completion means visible: non-temporal stores are not ordered by themselves
  return true;
}

#else

bool copy_streaming(const iovec *, const iovec *, size_t) { return false; }

#endif

}  // namespace

void copy_pieces(const iovec *to, const iovec *from, size_t count, CopyHint hint) {
  if (hint == CopyHint::kStreaming && copy_streaming(to, from, count)) return;
  for (size_t i = 0; i < count; ++i) {
    if (i + 1 < count) __builtin_prefetch(from[i + 1].iov_base);
    // memmove: a user may legally move a region onto itself.
    std::memmove(to[i].iov_base, from[i].iov_base, from[i].iov_len);
  }
}

}  // namespace kvlink::host
