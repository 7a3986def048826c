// SHA-256 (FIPS 180-4) and HMAC-SHA-256 (RFC 2104): proofs on data connections, nothing more.
#ifndef KVLINK_HOST_SHA256_H
#define KVLINK_HOST_SHA256_H

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvlink::host {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  Sha256();
  void update(const void *data, size_t length);
  Digest finish();

 private:
  void compress(const uint8_t *block);

  uint32_t state_[8];
  uint64_t length_ = 0;
  uint8_t buffer_[64];
};

Digest hmac_sha256(const void *key, size_t key_length, const void *data, size_t length);

// Compares without stopping at the first difference.
bool equal_digests(const Digest &a, const Digest &b);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_SHA256_H
