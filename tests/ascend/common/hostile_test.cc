// The staging area against peers that do not play by the rules: no key, wrong frames, offsets and regions they were not
// given.
#include <sys/socket.h>

#include <cstring>

#include "ascend/common/staging_side.h"
#include "ascend/staging_wire.h"

using namespace kvlink::test;

namespace {

// The peer's access bits and a region that is not staged cannot be reached through the side connection.
void test_denied_by_access(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  std::vector<uint8_t> from(4096, 1), to(4096, 2);
  a.open_region(1, from.data(), from.size());
  b.open_region(1, to.data(), to.size(), KVL_ACCESS_READ);
  uint64_t pinned = 0;
  CHECK(b.memory->allocate(KVL_MEMORY_HOST, 4096, &pinned).ok());
  b.open_region(2, reinterpret_cast<void *>(pinned), 4096);
  CHECK(!b.memory->regions().get(2)->staged);
  // A requester that lies about what it was told.
  auto liar = std::make_shared<RemoteRegion>();
  liar->access = 3;
  liar->staged = true;
  liar->address = 0x1000;
  liar->length = 1 << 20;
  liar->handle = liar->peer_mem = 1;
  auto second = std::make_shared<RemoteRegion>(*liar);
  second->handle = second->peer_mem = 2;
  CHECK(a.remotes.insert(liar) && a.remotes.insert(second));
  CHECK_EQ(a.transfer(KVL_PUT, {{1, 1, 0, 0, 16}}).status, KVL_DENIED);
  CHECK_EQ(a.transfer(KVL_GET, {{1, 1, 0, 0, 16}}).status, KVL_OK);
  CHECK_EQ(a.transfer(KVL_GET, {{1, 1, 0, 4090, 16}}).status, KVL_REMOTE);
  CHECK_EQ(a.transfer(KVL_PUT, {{1, 2, 0, 0, 16}}).status, KVL_DENIED);
  CHECK(to == std::vector<uint8_t>(4096, 2));
  CHECK(b.memory->close(2).ok());
  b.memory->free(pinned);
}

// Whoever does not know the key gets nothing, keeps nothing and holds nobody up.
void test_strangers(const std::shared_ptr<const Device> &device) {
  StagingSide b(device, KVL_ROLE_ACCEPTOR, kArea);
  StagingBlob blob;
  b.link->describe(&blob);
  CHECK(blob.enabled == 1 && blob.port != 0 && blob.window_length >= 64 * 1024);
  SessionId session;
  session.fill(7);
  const kvl_link_params right = link_params(KVL_ROLE_INITIATOR, 7, 9), wrong = link_params(KVL_ROLE_INITIATOR, 7, 8);
  UniqueFd socket;
  CHECK(connect_side(blob.host, blob.port, session, wrong.session_key, in_ms(5000), &socket).status == KVL_DENIED);
  SessionId other;
  other.fill(1);
  CHECK(!connect_side(blob.host, blob.port, other, right.session_key, in_ms(5000), &socket).ok());
  std::vector<UniqueFd> silent(80);
  for (UniqueFd &fd : silent) CHECK(kvlink::host::connect_tcp(blob.host, blob.port, in_ms(5000), &fd).ok());
  UniqueFd noise;
  CHECK(kvlink::host::connect_tcp(blob.host, blob.port, in_ms(5000), &noise).ok());
  std::vector<char> rubbish(4096, 'x');
  static_cast<void>(send(noise.get(), rubbish.data(), rubbish.size(), MSG_NOSIGNAL) < 0);
  CHECK(connect_side(blob.host, blob.port, session, right.session_key, in_ms(5000), &socket).ok());
  // The place is taken: a second proof for the same session is refused.
  UniqueFd second;
  CHECK(!connect_side(blob.host, blob.port, session, right.session_key, in_ms(5000), &second).ok());
  CHECK(b.refused() >= 4);
}

// A peer that proved its key and then sends what no kvlink sends.
void test_broken_frames(const std::shared_ptr<const Device> &device) {
  for (int kind = 0; kind < 6; ++kind) {
    StagingSide b(device, KVL_ROLE_ACCEPTOR, kArea);
    StagingBlob blob;
    b.link->describe(&blob);
    std::vector<uint8_t> memory(4096, 5);
    b.open_region(1, memory.data(), memory.size());
    SessionId session;
    session.fill(7);
    const kvl_link_params params = link_params(KVL_ROLE_INITIATOR, 7, 9);
    UniqueFd socket;
    CHECK(connect_side(blob.host, blob.port, session, params.session_key, in_ms(5000), &socket).ok());
    struct {
      SideHeader header;
      SideEntry entry;
    } frame{};
    frame.header.magic = SideHeader::kMagic;
    frame.header.type = static_cast<uint16_t>(SideType::kCommit);
    frame.header.count = 1;
    frame.header.id = 77;
    frame.entry = {0, 1, 100};
    bool answered = false;
    if (kind == 0) frame.header.magic ^= 1;
    if (kind == 1) frame.header.type = 9;
    if (kind == 2) frame.header.count = kMaxSideEntries + 1;
    if (kind == 3) frame.header.count = 0;
    if (kind == 4) answered = true, frame.header.window_offset = UINT64_MAX - 10;
    if (kind == 5) answered = true, frame.entry.length = UINT32_MAX;
    CHECK(kvlink::host::send_all(socket.get(), &frame, sizeof frame, in_ms(5000)).ok());
    SideHeader answer{};
    const Failure got = kvlink::host::receive_all(socket.get(), &answer, sizeof answer, in_ms(10000));
    CHECK_EQ(got.ok(), answered);
    if (answered) CHECK(answer.id == 77 && answer.status == KVL_INVALID && b.link->check().ok());
    if (!answered) CHECK(got.status != KVL_TIMEOUT && !b.link->check().ok());
    CHECK(memory == std::vector<uint8_t>(4096, 5));
  }
}

// One request larger than what passes to a device in one copy: the pieces meet its borders anywhere.
void test_large_request(const std::shared_ptr<const Device> &device) {
  StagingSide b(device, KVL_ROLE_ACCEPTOR, uint64_t{16} << 20);
  StagingBlob blob;
  b.link->describe(&blob);
  std::vector<uint8_t> from(5000000), to(5000000), seen(5000000);
  fill(from.data(), from.size(), 21);
  b.open_region(1, from.data(), from.size(), KVL_ACCESS_READ);
  b.open_region(2, to.data(), to.size(), KVL_ACCESS_WRITE);
  SessionId session;
  session.fill(7);
  const kvl_link_params params = link_params(KVL_ROLE_INITIATOR, 7, 9);
  UniqueFd socket;
  CHECK(connect_side(blob.host, blob.port, session, params.session_key, in_ms(5000), &socket).ok());
  struct {
    SideHeader header;
    SideEntry table[4];
  } frame{};
  frame.header.magic = SideHeader::kMagic;
  frame.header.count = 4;
  frame.header.window_offset = 33;
  const uint32_t lengths[] = {1000001, 17, 1600000, 1048576};
  const auto ask = [&](SideType type, uint32_t mem) {
    uint64_t offset = 3;
    for (int i = 0; i < 4; ++i) {
      frame.table[i] = {offset, mem, lengths[i]};
      offset += lengths[i] + 100;
    }
    frame.header.type = static_cast<uint16_t>(type);
    CHECK(kvlink::host::send_all(socket.get(), &frame, sizeof frame, in_ms(5000)).ok());
    SideHeader answer{};
    CHECK(kvlink::host::receive_all(socket.get(), &answer, sizeof answer, in_ms(30000)).ok());
    CHECK_EQ(answer.status, KVL_OK);
  };
  ask(SideType::kFetch, 1);
  ask(SideType::kCommit, 2);
  uint64_t offset = 3;
  for (const uint32_t length : lengths) {
    std::memcpy(&seen[offset], &from[offset], length);
    offset += length + 100;
  }
  CHECK(to == seen);
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  use_simulator(arguments[1], "9.1");
  {
    std::unique_ptr<Device> opened;
    CHECK(Device::open(0, &opened).ok());
    const std::shared_ptr<const Device> device = std::move(opened);
    const int descriptors = open_descriptors();
    // Without RoCE inside the server the arena is device memory, with it pinned host memory.
    for (const bool roce : {false, true}) {
      unsetenv("HCCL_INTRA_ROCE_ENABLE");
      if (roce) setenv("HCCL_INTRA_ROCE_ENABLE", "1", 1);
      test_denied_by_access(device);
      test_strangers(device);
      test_broken_frames(device);
      test_large_request(device);
    }
    CHECK_EQ(open_descriptors(), descriptors);
  }
  CHECK_EQ(live("host_memory"), int64_t{0});
  CHECK_EQ(live("device_memory"), int64_t{0});
  std::puts("hostile: passed");
  return 0;
}
