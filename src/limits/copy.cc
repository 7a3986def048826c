#include <cerrno>
#include <cstring>

#include "common.h"
#include "limits.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvlink::limits {
namespace {

#if defined(__x86_64__)

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 1024;

// Non-temporal stores; with `prefetch`, the source is fetched by hand, across the end of a block into the next.
template <bool prefetch>
__attribute__((target("avx2"))) void stream_block(char *to, const char *from, int64_t length, const char *next) {
  int64_t at = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (at > length) at = length;
  std::memcpy(to, from, static_cast<size_t>(at));
  for (; at + kLine <= length; at += kLine) {
    if (prefetch) {
      const int64_t ahead = at + kAhead;
      const char *line = ahead < length ? from + ahead : next != nullptr ? next + (ahead - length) : from + at;
      _mm_prefetch(line, _MM_HINT_T0);
    }
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at + 32), high);
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(length - at));
}

bool can_stream() { return __builtin_cpu_supports("avx2") != 0; }
void fence() { _mm_sfence(); }

#else

template <bool prefetch>
void stream_block(char *, const char *, int64_t, const char *) {}
bool can_stream() { return false; }
void fence() {}

#endif

template <typename Copy>
void each_block(char *local, char *remote, const Block *blocks, uint64_t count, bool put, Copy copy) {
  for (uint64_t i = 0; i < count; ++i) {
    const Block &block = blocks[i];
    char *here = local + block.local;
    char *there = remote + block.remote;
    const char *next = nullptr;
    if (i + 1 < count) next = put ? local + blocks[i + 1].local : remote + blocks[i + 1].remote;
    copy(put ? there : here, put ? here : there, block.length, next);
  }
}

}  // namespace
}  // namespace kvlink::limits

KVM_EXPORT double kvm_copy(char *local, char *remote, const int64_t *triples, uint64_t count, int32_t operation,
                           int32_t mode) {
  using namespace kvlink::limits;
  const Block *blocks = as_blocks(triples);
  const bool put = operation == KVM_PUT;
  if (mode != KVM_COPY_MEMCPY && !can_stream()) return -ENOTSUP;
  const Stopwatch watch;
  switch (mode) {
    case KVM_COPY_MEMCPY:
      each_block(local, remote, blocks, count, put, [](char *to, const char *from, int64_t length, const char *) {
        std::memcpy(to, from, static_cast<size_t>(length));
      });
      break;
    case KVM_COPY_STREAM:
      each_block(local, remote, blocks, count, put, stream_block<false>);
      fence();
      break;
    case KVM_COPY_STREAM_PREFETCH:
      each_block(local, remote, blocks, count, put, stream_block<true>);
      fence();
      break;
    default:
      return -EINVAL;
  }
  return watch.seconds();
}
