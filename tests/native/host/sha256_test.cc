// The published vectors: FIPS 180-4 examples and RFC 4231.
#include "sha256.h"

#include <cstring>
#include <string>

#include "harness.h"

using namespace kvlink::host;

namespace {

int checks = 0;

std::string hex(const Digest &digest) {
  std::string text;
  char two[3];
  for (const uint8_t byte : digest) {
    std::snprintf(two, sizeof two, "%02x", byte);
    text += two;
  }
  return text;
}

void expect_hash(const std::string &input, const char *expected) {
  Sha256 hash;
  hash.update(input.data(), input.size());
  CHECK(hex(hash.finish()) == expected);
  // Any split gives the same digest.
  for (size_t step : {1, 3, 63, 64, 65}) {
    Sha256 pieces;
    for (size_t at = 0; at < input.size(); at += step) pieces.update(&input[at], std::min(step, input.size() - at));
    CHECK(hex(pieces.finish()) == expected);
  }
  ++checks;
}

void expect_hmac(const std::string &key, const std::string &data, const char *expected) {
  CHECK(hex(hmac_sha256(key.data(), key.size(), data.data(), data.size())) == expected);
  ++checks;
}

}  // namespace

int main() {
  expect_hash("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  expect_hash("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  expect_hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  expect_hash(std::string(1000000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");

  expect_hmac(std::string(20, '\x0b'), "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  expect_hmac("Jefe", "what do ya want for nothing?",
              "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  expect_hmac(std::string(20, '\xaa'), std::string(50, '\xdd'),
              "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
  expect_hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First",
              "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");

  Digest a = hmac_sha256("k", 1, "m", 1);
  Digest b = a;
  CHECK(equal_digests(a, b));
  b[31] ^= 1;
  CHECK(!equal_digests(a, b));
  std::printf("sha256: %d vectors passed\n", checks);
  return 0;
}
