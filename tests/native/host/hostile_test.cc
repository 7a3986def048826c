// Garbage, wrong proofs and dishonest peers: a clear refusal, nothing written outside what is published, and the
// listener and a good peer's link unharmed. The child is the victim; the parent attacks it and is the good peer too.
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "local_socket.h"
#include "wire_client.h"

using namespace kvlink::host;
using namespace kvlink::test;

namespace {

constexpr uint64_t kBytes = 1 << 20;
constexpr uint32_t kMem = 3, kReadOnly = 4, kRemote = 5;
constexpr uint8_t kFirstSession = 20, kSessions = 40, kKey = 9;

using Attack = std::function<void(TestEngine &, const Bytes &victim)>;

// After the attack the good link still moves bytes both ways, and the victim's memory is what the good peer made it.
void attacked(const char *name, const char *path, const Attack &attack, uint64_t least_denied, uint64_t least_refused,
              uint64_t least_broken) {
  run_pair(
      name,
      [&](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", path}});
        uint8_t *data = engine.allocate(kBytes);
        fill(data, kBytes, 1);
        engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
        kvl_link *link = connect_pair(engine, pipe, true);
        exchange_region(engine, link, pipe, kMem, kRemote);
        attack(engine, pipe.receive());
        CHECK_EQ(transfer(engine, link, KVL_PUT, {{kMem, kRemote, 0, 0, kBytes}}).status, KVL_OK);
        pipe.signal();
        pipe.await();
        std::memset(data, 0, kBytes);
        CHECK_EQ(transfer(engine, link, KVL_GET, {{kMem, kRemote, 0, 0, kBytes}}).status, KVL_OK);
        for (uint64_t i = 0; i < kBytes; ++i) CHECK_EQ(data[i], pattern(1, i));
        pipe.signal();
        provider().link_close(link, 100);
      },
      [&](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", path}});
        uint8_t *data = engine.allocate(kBytes);
        uint8_t *fixed = engine.allocate(kBytes);
        fill(data, kBytes, 2);
        fill(fixed, kBytes, 3);
        engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
        engine.open_region(kReadOnly, fixed, kBytes, KVL_ACCESS_READ);
        std::vector<kvl_link *> links;
        for (uint8_t i = 0; i < kSessions; ++i) {
          links.push_back(open_link(engine, link_params(KVL_ROLE_ACCEPTOR, static_cast<uint8_t>(kFirstSession + i))));
        }
        kvl_link *link = connect_pair(engine, pipe, false);
        exchange_region(engine, link, pipe, kMem, kRemote);
        pipe.send(describe(links[0]));
        pipe.await();
        for (uint64_t i = 0; i < kBytes; ++i) CHECK_EQ(data[i], pattern(1, i));
        for (uint64_t i = 0; i < kBytes; ++i) CHECK_EQ(fixed[i], pattern(3, i));
        CHECK(engine.statistic("denied_accesses") >= least_denied);
        CHECK(engine.statistic("auth_failures") >= least_refused);
        CHECK(engine.statistic("protocol_errors") >= least_broken);
        pipe.signal();
        pipe.await();
        for (kvl_link *each : links) provider().link_close(each, 0);
        provider().link_close(link, 100);
      });
}

void send_garbage(const Bytes &victim, StreamKind kind) {
  std::mt19937 random(1);
  for (const size_t size : {1, 15, 63, 64, 65, 128, 4096, 100000}) {
    WireClient client(victim, kind);
    Bytes junk(size);
    for (uint8_t &byte : junk) byte = static_cast<uint8_t>(random());
    static_cast<void>(::send(client.fd(), junk.data(), junk.size(), MSG_NOSIGNAL));
    shutdown(client.fd(), SHUT_WR);
    CHECK(client.closed());
  }
}

void listener_attacks(const Bytes &victim, StreamKind kind) {
  send_garbage(victim, kind);
  {
    WireClient unknown_session(victim, kind);
    const Hello hello = unknown_session.hello(200);
    unknown_session.send(&hello, sizeof hello);
    CHECK(unknown_session.closed());
  }
  {
    WireClient wrong_version(victim, kind);
    Hello hello = wrong_version.hello(kFirstSession);
    hello.version = 99;
    wrong_version.send(&hello, sizeof hello);
    CHECK(wrong_version.closed());
  }
  {
    WireClient wrong_kind(victim, kind);
    Hello hello = wrong_kind.hello(kFirstSession);
    hello.kind ^= 3;
    wrong_kind.send(&hello, sizeof hello);
    CHECK(wrong_kind.closed());
  }
  {
    WireClient wrong_key(victim, kind);
    const Hello hello = wrong_key.hello(kFirstSession);
    const Proof proof = WireClient::proof(kKey + 1, hello, wrong_key.challenge(hello));
    wrong_key.send(&proof, sizeof proof);
    CHECK(wrong_key.closed());
  }
  {
    WireClient reflector(victim, kind);
    const Hello hello = reflector.hello(kFirstSession);
    const Challenge challenge = reflector.challenge(hello);
    Proof proof{};
    proof.magic = Proof::kMagic;
    proof.proof = challenge.proof;
    reflector.send(&proof, sizeof proof);
    CHECK(reflector.closed());
  }
  {
    WireClient first(victim, kind);
    const Hello hello = first.hello(kFirstSession);
    const Proof recorded = WireClient::proof(kKey, hello, first.challenge(hello));
    WireClient replayer(victim, kind);
    replayer.challenge(hello);
    replayer.send(&recorded, sizeof recorded);
    CHECK(replayer.closed());
  }
  // More silent connections than are kept: the oldest make room, a real one gets in.
  std::vector<std::unique_ptr<WireClient>> silent;
  for (int i = 0; i < 100; ++i) silent.push_back(std::make_unique<WireClient>(victim, kind));
  WireClient real(victim, kind);
  real.authenticate(kFirstSession, kKey);
  CHECK(silent[0]->closed());
  CHECK(silent[99]->closed());  // five seconds after it came
}

void expect_refused(WireClient &client, const TableEntry &entry, FrameType type) {
  client.request(type, {entry}, type == FrameType::kPut ? Bytes(entry.length, 0xee) : Bytes());
  const FrameHeader answer = client.answer();
  CHECK_EQ(answer.status, KVL_DENIED);
  CHECK_EQ(answer.bytes, 0u);
}

void out_of_range(TestEngine &, const Bytes &victim) {
  WireClient client(victim, StreamKind::kTcp);
  client.authenticate(kFirstSession, kKey);
  const TableEntry wrong[] = {{kBytes, kMem, 1},
                              {kBytes - 1, kMem, 2},
                              {UINT64_MAX, kMem, 2},
                              {UINT64_MAX - 4095, kMem, 8192},
                              {0, kMem + (1u << KVL_HANDLE_INDEX_BITS), 16},  // another generation
                              {0, 77, 16},
                              {0, UINT32_MAX, 16}};
  for (const TableEntry &entry : wrong) {
    expect_refused(client, entry, FrameType::kPut);
    expect_refused(client, entry, FrameType::kGet);
  }
  expect_refused(client, {0, kReadOnly, 100}, FrameType::kPut);
  // One bad entry refuses the whole frame; nothing of it is written.
  client.request(FrameType::kPut, {{0, kMem, 64}, {kBytes, kMem, 64}}, Bytes(128, 0xee));
  CHECK_EQ(client.answer().status, KVL_DENIED);
  // The stream still serves what is allowed.
  client.request(FrameType::kGet, {{100, kReadOnly, 50}}, {});
  const FrameHeader answer = client.answer();
  CHECK_EQ(answer.status, KVL_OK);
  uint8_t data[50];
  client.receive(data, sizeof data);
  for (uint64_t i = 0; i < sizeof data; ++i) CHECK_EQ(data[i], pattern(3, 100 + i));
}

void broken_frames(TestEngine &, const Bytes &victim) {
  uint8_t session = kFirstSession;
  const auto attack = [&](const std::function<void(WireClient &)> &act) {
    WireClient client(victim, StreamKind::kTcp);
    client.authenticate(session++, kKey);
    act(client);
    CHECK(client.closed());
  };
  const auto header = [](uint16_t type, uint16_t count, uint32_t bytes, uint64_t id = 1) {
    return FrameHeader{FrameHeader::kMagic, type, count, bytes, 0, id};
  };
  const auto send_header = [&](const FrameHeader &frame) {
    attack([frame](WireClient &client) { client.send(&frame, sizeof frame); });
  };
  FrameHeader wrong_magic = header(1, 1, 1);
  wrong_magic.magic = 0;
  send_header(wrong_magic);
  send_header(header(0, 1, 1));
  send_header(header(9, 1, 1));
  send_header(header(1, 0, 0));                       // empty request
  send_header(header(1, 1, kMaxFrameBytes + 1));      // oversized payload
  send_header(header(1, kMaxFrameRanges + 1, 4096));  // oversized table
  send_header(header(2, 0, 0));                       // an acknowledgement of nothing
  send_header(header(4, 0, 1 << 20));                 // data that nobody asked for
  send_header(header(2, 5, 0));
  for (const uint32_t length : {0u, 50u, UINT32_MAX}) {  // the sum is wrong
    attack([&](WireClient &client) {
      const FrameHeader frame = header(1, 1, 100);
      const TableEntry entry{0, kMem, length};
      client.send(&frame, sizeof frame);
      client.send(&entry, sizeof entry);
    });
  }
  attack([&](WireClient &client) {  // truncated in the middle of a table
    const FrameHeader frame = header(1, 10, 100);
    client.send(&frame, sizeof frame);
    client.send(&frame, 7);
    shutdown(client.fd(), SHUT_WR);
  });
  attack([&](WireClient &client) {  // truncated in the middle of a payload
    const FrameHeader frame = header(1, 1, 100);
    const TableEntry entry{0, kMem, 100};
    client.send(&frame, sizeof frame);
    client.send(&entry, sizeof entry);
    client.send(&frame, 10);
    shutdown(client.fd(), SHUT_WR);
  });
  attack([&](WireClient &client) {  // far more requests than may be unanswered, and no answer read
    const FrameHeader frame = header(3, 1, 1 << 20);
    const TableEntry entry{0, kMem, 1 << 20};
    for (int i = 0; i < 200; ++i) {
      if (::send(client.fd(), &frame, sizeof frame, MSG_NOSIGNAL) < 0) return;
      if (::send(client.fd(), &entry, sizeof entry, MSG_NOSIGNAL) < 0) return;
    }
  });
}

void local_messages(TestEngine &, const Bytes &victim) {
  uint8_t session = kFirstSession;
  const auto ask = [](uint32_t type, uint32_t mem) {
    LocalMessage message{};
    message.magic = LocalMessage::kMagic;
    message.type = type;
    message.mem = mem;
    return message;
  };
  {
    WireClient client(victim, StreamKind::kLocal);
    client.authenticate(session++, kKey);
    for (const uint32_t mem : {77u, UINT32_MAX, kMem + (1u << KVL_HANDLE_INDEX_BITS)}) {
      const LocalMessage request = ask(2, mem);
      client.send(&request, sizeof request);
      LocalMessage reply{};
      client.receive(&reply, sizeof reply);
      CHECK_EQ(reply.status, KVL_DENIED);
    }
  }
  const auto attack = [&](const void *data, size_t length) {
    WireClient client(victim, StreamKind::kLocal);
    client.authenticate(session++, kKey);
    client.send(data, length);
    CHECK(client.closed());
  };
  const LocalMessage unknown = ask(17, kMem);
  attack(&unknown, sizeof unknown);
  LocalMessage wrong_magic = ask(2, kMem);
  wrong_magic.magic = 1;
  attack(&wrong_magic, sizeof wrong_magic);
  const LocalMessage request = ask(2, kMem);
  attack(&request, sizeof request - 1);
  const Bytes large(5000, 1);
  attack(large.data(), large.size());
}

// A listener that knows no key: it reflects what the initiator sends, or makes something up.
void false_listener(TestEngine &engine, const Bytes &victim) {
  for (const bool reflect : {true, false}) {
    LinkBlob blob{};
    CHECK(parse_link_blob(victim.data(), victim.size(), &blob).ok());
    UniqueFd listener;
    CHECK(listen_tcp("127.0.0.1", 0, &listener, &blob.port).ok());
    std::memset(blob.boot_id, 0, sizeof blob.boot_id);
    std::thread server([&] {
      pollfd item{listener.get(), POLLIN, 0};
      CHECK_EQ(poll(&item, 1, 5000), 1);
      UniqueFd socket(accept(listener.get(), nullptr, nullptr));
      Hello hello{};
      const Deadline deadline{now_ns() + 5000000000u, -1};
      CHECK(receive_all(socket.get(), &hello, sizeof hello, deadline).ok());
      Challenge challenge{};
      challenge.magic = Challenge::kMagic;
      std::memcpy(challenge.nonce, hello.nonce, sizeof hello.nonce);
      if (!reflect) random_bytes(challenge.proof.data(), challenge.proof.size());
      CHECK(send_all(socket.get(), &challenge, sizeof challenge, deadline).ok());
    });
    kvl_link *link = open_link(engine, link_params(KVL_ROLE_INITIATOR, 99));
    kvl_error err = make_error();
    CHECK_EQ(provider().link_connect(link, &blob, sizeof blob, 5000, &err), KVL_DENIED);
    CHECK(std::strlen(err.message) > 0);
    server.join();
    provider().link_close(link, 0);
  }
}

void wrong_key_peer(TestEngine &engine, const Bytes &victim) {
  kvl_link *link = open_link(engine, link_params(KVL_ROLE_INITIATOR, kFirstSession, kKey + 1));
  kvl_error err = make_error();
  CHECK_EQ(provider().link_connect(link, victim.data(), victim.size(), 5000, &err), KVL_DENIED);
  provider().link_close(link, 0);
}

void bad_blobs(TestEngine &engine, const Bytes &victim) {
  kvl_link *link = open_link(engine, link_params(KVL_ROLE_INITIATOR, kFirstSession));
  std::mt19937 random(3);
  for (size_t length = 0; length <= victim.size() + 8; length += 7) {
    Bytes junk(length);
    for (uint8_t &byte : junk) byte = static_cast<uint8_t>(random());
    kvl_error err = make_error();
    CHECK_EQ(provider().link_connect(link, junk.data(), junk.size(), 1000, &err), KVL_INVALID);
  }
  Bytes endless = victim;
  std::fill(endless.begin() + 16, endless.end(), uint8_t{'a'});
  kvl_error err = make_error();
  CHECK_EQ(provider().link_connect(link, endless.data(), endless.size(), 1000, &err), KVL_INVALID);
  provider().link_close(link, 0);
}

}  // namespace

int main() {
  attacked(
      "garbage and false proofs on the TCP listener", "tcp",
      [](TestEngine &, const Bytes &victim) { listener_attacks(victim, StreamKind::kTcp); }, 0, 14, 0);
  attacked(
      "garbage and false proofs on the Unix listener", "auto",
      [](TestEngine &, const Bytes &victim) { listener_attacks(victim, StreamKind::kLocal); }, 0, 14, 0);
  attacked("accesses outside what is published", "tcp", out_of_range, 16, 0, 0);
  attacked("broken frames", "tcp", broken_frames, 0, 0, 13);
  attacked("broken messages on the Unix socket", "auto", local_messages, 3, 0, 4);
  attacked("a listener without the key", "tcp", false_listener, 0, 0, 0);
  attacked("a peer with another key, over TCP", "tcp", wrong_key_peer, 0, 0, 0);
  attacked("a peer with another key, over the Unix socket", "auto", wrong_key_peer, 0, 0, 0);
  attacked("link descriptions that are garbage", "auto", bad_blobs, 0, 0, 0);
  return finish("hostile");
}
