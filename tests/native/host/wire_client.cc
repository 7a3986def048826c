#include "wire_client.h"

#include <poll.h>
#include <sys/socket.h>

#include <cstring>

namespace kvlink::test {

using namespace kvlink::host;

namespace {

Deadline soon() { return {now_ns() + 5000000000u, -1}; }

}  // namespace

WireClient::WireClient(const Bytes &link_blob, StreamKind kind) : kind_(kind) {
  LinkBlob blob{};
  CHECK(parse_link_blob(link_blob.data(), link_blob.size(), &blob).ok());
  const Failure failure = kind == StreamKind::kTcp ? connect_tcp(blob.host, blob.port, soon(), &fd_)
                                                   : connect_local(blob.local_name, soon(), &fd_);
  if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
  CHECK(failure.ok());
}

void WireClient::send(const void *data, size_t length) { CHECK(send_all(fd_.get(), data, length, soon()).ok()); }

void WireClient::receive(void *data, size_t length) { CHECK(receive_all(fd_.get(), data, length, soon()).ok()); }

bool WireClient::closed() {
  char sink[4096];
  for (;;) {
    pollfd item{fd_.get(), POLLIN, 0};
    if (poll(&item, 1, 7000) != 1) return false;
    if (recv(fd_.get(), sink, sizeof sink, MSG_DONTWAIT) <= 0) return true;
  }
}

Hello WireClient::hello(uint8_t session, uint16_t index, uint16_t count) const {
  Hello hello{};
  hello.magic = Hello::kMagic;
  hello.version = kWireVersion;
  hello.kind = static_cast<uint32_t>(kind_);
  hello.index = index;
  hello.stream_count = kind_ == StreamKind::kTcp ? count : uint16_t{0};
  std::memset(hello.session, session, sizeof hello.session);
  CHECK(random_bytes(hello.nonce, sizeof hello.nonce));
  return hello;
}

Challenge WireClient::challenge(const Hello &hello) {
  send(&hello, sizeof hello);
  Challenge challenge{};
  receive(&challenge, sizeof challenge);
  CHECK_EQ(challenge.magic, Challenge::kMagic);
  return challenge;
}

Proof WireClient::proof(uint8_t key, const Hello &hello, const Challenge &challenge) {
  uint8_t session_key[32];
  std::memset(session_key, key, sizeof session_key);
  Proof proof{};
  proof.magic = Proof::kMagic;
  proof.proof = client_proof(session_key, hello, challenge, proof);
  return proof;
}

void WireClient::authenticate(uint8_t session, uint8_t key, uint16_t index, uint16_t count) {
  const Hello greeting = hello(session, index, count);
  const Challenge asked = challenge(greeting);
  const Proof answered = proof(key, greeting, asked);
  send(&answered, sizeof answered);
  Ready ready{};
  receive(&ready, sizeof ready);
  CHECK_EQ(ready.magic, Ready::kMagic);
}

void WireClient::request(FrameType type, const std::vector<TableEntry> &table, const Bytes &payload) {
  FrameHeader header{};
  header.magic = FrameHeader::kMagic;
  header.type = static_cast<uint16_t>(type);
  header.count = static_cast<uint16_t>(table.size());
  for (const TableEntry &entry : table) header.bytes += entry.length;
  header.id = next_id_++;
  send(&header, sizeof header);
  if (!table.empty()) send(table.data(), table.size() * sizeof table[0]);
  if (!payload.empty()) send(payload.data(), payload.size());
}

FrameHeader WireClient::answer() {
  FrameHeader header{};
  receive(&header, sizeof header);
  CHECK_EQ(header.magic, FrameHeader::kMagic);
  return header;
}

}  // namespace kvlink::test
