#include "auth.h"

#include <cstring>

namespace kvlink::host {
namespace {

struct Transcript {
  char role[16];
  Hello hello;
  uint8_t server_nonce[32];
  ProbeTarget probe;
};
static_assert(sizeof(Transcript) == 136, "a signed struct has no padding");

Digest prove(const uint8_t (&key)[32], const char *role, const Hello &hello, const Challenge &challenge,
             const ProbeTarget &probe) {
  Transcript transcript{};
  std::memcpy(transcript.role, role, std::strlen(role));
  transcript.hello = hello;
  std::memcpy(transcript.server_nonce, challenge.nonce, sizeof challenge.nonce);
  transcript.probe = probe;
  return hmac_sha256(key, sizeof key, &transcript, sizeof transcript);
}

}  // namespace

Digest server_proof(const uint8_t (&key)[32], const Hello &hello, const Challenge &challenge) {
  return prove(key, "kvlink server", hello, challenge, ProbeTarget{});
}

Digest client_proof(const uint8_t (&key)[32], const Hello &hello, const Challenge &challenge, const Proof &proof) {
  return prove(key, "kvlink client", hello, challenge, proof.probe);
}

}  // namespace kvlink::host
