#include <algorithm>
#include <cstring>

#include "common.h"
#include "limits.h"

namespace kvlink::limits {
namespace {

constexpr uint64_t kWord = sizeof(uint64_t);

// splitmix64's finaliser: any two places or seeds differ in about half of the bits.
uint64_t word_at(uint64_t index, uint64_t seed) {
  uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull + seed;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

bool block_holds(const char *data, uint64_t source, uint64_t length, uint64_t seed) {
  uint64_t at = 0;
  while (at < length) {
    const uint64_t place = source + at;
    const uint64_t skip = place % kWord;
    const uint64_t piece = std::min(kWord - skip, length - at);
    const uint64_t word = word_at(place / kWord, seed);
    if (std::memcmp(data + at, reinterpret_cast<const char *>(&word) + skip, piece) != 0) return false;
    at += piece;
  }
  return true;
}

}  // namespace
}  // namespace kvlink::limits

KVM_EXPORT void kvm_fill(char *memory, uint64_t bytes, uint64_t seed) {
  using namespace kvlink::limits;
  for (uint64_t at = 0; at < bytes; at += kWord) {
    const uint64_t word = word_at(at / kWord, seed);
    std::memcpy(memory + at, &word, std::min(kWord, bytes - at));
  }
}

KVM_EXPORT uint64_t kvm_wrong_blocks(const char *memory, const int64_t *triples, uint64_t count, uint64_t seed,
                                     int32_t side) {
  using namespace kvlink::limits;
  const Block *blocks = as_blocks(triples);
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const int64_t mine = side == 0 ? blocks[i].local : blocks[i].remote;
    const int64_t theirs = side == 0 ? blocks[i].remote : blocks[i].local;
    const auto source = static_cast<uint64_t>(theirs);
    if (!block_holds(memory + mine, source, static_cast<uint64_t>(blocks[i].length), seed)) ++wrong;
  }
  return wrong;
}

KVM_EXPORT int32_t kvm_clear_and_check(char *memory, uint64_t bytes, const int64_t *triples, uint64_t count,
                                       int32_t side) {
  using namespace kvlink::limits;
  const Block *blocks = as_blocks(triples);
  for (uint64_t i = 0; i < count; ++i) {
    char *block = memory + (side == 0 ? blocks[i].local : blocks[i].remote);
    std::memset(block, 0, static_cast<size_t>(blocks[i].length));
  }
  static constexpr char kZero[4096] = {};
  for (uint64_t at = 0; at < bytes; at += sizeof kZero) {
    if (std::memcmp(memory + at, kZero, std::min<uint64_t>(sizeof kZero, bytes - at)) != 0) return 0;
  }
  return 1;
}
