// The handshake of every data connection: both sides prove that they know the link's session key.
//
//   client -> server   Hello      which link, which stream, the client's nonce
//   server -> client   Challenge  the server's nonce and proof
//   client -> server   Proof      the client's proof, covering what it says about itself
//   server -> client   Ready      what the server says about itself
//
// A proof is an HMAC under the session key over the prover's role, the session, the kind and index of the stream and
// both nonces: it holds for this connection and this direction only, so replayed and reflected ones fail.
#ifndef KVLINK_HOST_AUTH_H
#define KVLINK_HOST_AUTH_H

#include <cstdint>

#include "sha256.h"

namespace kvlink::host {

enum class StreamKind : uint32_t { kTcp = 1, kLocal = 2 };

struct Hello {
  static constexpr uint32_t kMagic = 0x484b5648;
  uint32_t magic;
  uint32_t version;
  uint32_t kind;          // enum StreamKind
  uint16_t index;         // of this stream
  uint16_t stream_count;  // that the client opens; 0 on the Unix socket
  uint8_t session[16];
  uint8_t nonce[32];
};
static_assert(sizeof(Hello) == 64, "a wire struct has no padding");

struct Challenge {
  static constexpr uint32_t kMagic = 0x434b5648;
  uint32_t magic;
  uint32_t reserved;
  uint8_t nonce[32];
  Digest proof;
};
static_assert(sizeof(Challenge) == 72, "a wire struct has no padding");

// Where the other side may read sixteen bytes to find out whether process_vm_readv works.
struct ProbeTarget {
  uint64_t address;
  uint8_t value[16];
};

struct Proof {
  static constexpr uint32_t kMagic = 0x504b5648;
  uint32_t magic;
  uint32_t reserved;
  ProbeTarget probe;
  Digest proof;
};
static_assert(sizeof(Proof) == 64, "a wire struct has no padding");

struct Ready {
  static constexpr uint32_t kMagic = 0x594b5648;
  uint32_t magic;
  uint32_t cma_works;  // the server could read the client's probe target
  ProbeTarget probe;
};
static_assert(sizeof(Ready) == 32, "a wire struct has no padding");

Digest server_proof(const uint8_t (&key)[32], const Hello &hello, const Challenge &challenge);
Digest client_proof(const uint8_t (&key)[32], const Hello &hello, const Challenge &challenge, const Proof &proof);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_AUTH_H
