// Registration leaves nothing behind, shared memory is handed out sealed and no wider than published, and links give
// their descriptors back.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "local_socket.h"
#include "wire_client.h"

using namespace kvlink::host;
using namespace kvlink::test;

namespace {

constexpr uint64_t kBytes = 1 << 20;
constexpr uint32_t kMem = 3, kRemote = 5;

long resident_kib() {
  FILE *file = std::fopen("/proc/self/statm", "re");
  CHECK(file != nullptr);
  long total = 0, resident = 0;
  CHECK_EQ(std::fscanf(file, "%ld %ld", &total, &resident), 2);
  std::fclose(file);
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

void cycle(TestEngine &engine, uint32_t index, uint8_t *data) {
  const uint32_t mem = 1 + (index << KVL_HANDLE_INDEX_BITS);  // the same place, a new generation
  engine.open_region(mem, data, kBytes, KVL_ACCESS_READ);
  CHECK_EQ(engine.export_region(mem).size(), sizeof(RegionBlob));
  kvl_error err = make_error();
  CHECK_EQ(provider().mem_close(engine.get(), mem, &err), KVL_OK);
  CHECK_EQ(provider().mem_close(engine.get(), mem, &err), KVL_INVALID);
}

void registration() {
  TestEngine engine(kvlink::test::Options{});
  uint8_t *data = engine.allocate(kBytes);
  for (uint32_t i = 0; i < 1000; ++i) cycle(engine, i % 4096, data);
  const int descriptors = open_descriptors();
  const long resident = resident_kib();
  for (uint32_t i = 0; i < 10000; ++i) cycle(engine, i % 4096, data);
  CHECK_EQ(open_descriptors(), descriptors);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(resident_kib() - resident <= 1024);  // the sanitizers keep freed memory and shadows of their own
#else
  CHECK(resident > 0);
#endif
  for (int i = 0; i < 200; ++i) {
    uint8_t *more = engine.allocate(kBytes);
    for (uint64_t at = 0; at < kBytes; at += 4096) CHECK_EQ(more[at], 0);
    CHECK_EQ(reinterpret_cast<uint64_t>(more) % 4096, 0u);
    provider().mem_free(engine.get(), reinterpret_cast<uint64_t>(more));
  }
  CHECK_EQ(open_descriptors(), descriptors);
  kvl_error err = make_error();
  kvl_mem_desc desc{sizeof desc, KVL_MEMORY_HOST, -1, KVL_ACCESS_READ, UINT64_MAX - 10, 100};
  CHECK_EQ(provider().mem_open(engine.get(), 9, &desc, &err), KVL_INVALID);
  desc = {sizeof desc, KVL_MEMORY_DEVICE, 0, KVL_ACCESS_READ, 4096, 100};
  CHECK_EQ(provider().mem_open(engine.get(), 9, &desc, &err), KVL_UNSUPPORTED);
  uint64_t address = 0;
  CHECK_EQ(provider().mem_alloc(engine.get(), KVL_MEMORY_HOST, uint64_t{1} << 50, &address, &err), KVL_NO_RESOURCE);
  provider().mem_free(engine.get(), reinterpret_cast<uint64_t>(data));
  std::printf("registration leaves nothing behind\n");
}

// Asks over the authenticated socket for the region's descriptor, as a peer that means harm would.
UniqueFd fetch(WireClient &client, uint32_t mem) {
  LocalMessage request{};
  request.magic = LocalMessage::kMagic;
  request.type = static_cast<uint32_t>(LocalMessageType::kDescriptorRequest);
  request.mem = mem;
  client.send(&request, sizeof request);
  LocalMessage reply{};
  iovec iov{&reply, sizeof reply};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr header{};
  header.msg_iov = &iov;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  CHECK(wait_for(client.fd(), 1 /* POLLIN */, {now_ns() + 5000000000u, -1}, "fetch").ok());
  CHECK_EQ(recvmsg(client.fd(), &header, MSG_CMSG_CLOEXEC), static_cast<ssize_t>(sizeof reply));
  cmsghdr *item = CMSG_FIRSTHDR(&header);
  if (item == nullptr) return UniqueFd();
  CHECK_EQ(reply.status, KVL_OK);
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(item), sizeof fd);
  return UniqueFd(fd);
}

void sharing() {
  run_pair(
      "shared memory is sealed and no wider than published",
      [](Pipe &pipe) {
        WireClient client(pipe.receive(), StreamKind::kLocal);
        client.authenticate(7, 9);
        UniqueFd writable = fetch(client, kMem);
        CHECK(static_cast<bool>(writable));
        CHECK_EQ(fcntl(writable.get(), F_GETFL) & O_ACCMODE, O_RDWR);
        CHECK(ftruncate(writable.get(), 0) != 0);
        CHECK(ftruncate(writable.get(), kBytes * 2) != 0);
        CHECK(fcntl(writable.get(), F_ADD_SEALS, F_SEAL_WRITE) != 0);
        UniqueFd fixed = fetch(client, kMem + 1);
        CHECK(static_cast<bool>(fixed));
        CHECK_EQ(fcntl(fixed.get(), F_GETFL) & O_ACCMODE, O_RDONLY);
        CHECK(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fixed.get(), 0) == MAP_FAILED);
        CHECK(!fetch(client, kMem + 2));  // a part of an allocation: its descriptor would give the rest away
        CHECK(!fetch(client, kMem + 3));  // no access published
        CHECK(!fetch(client, kMem + 4));  // plain memory
        pipe.signal();
      },
      [](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{});
        uint8_t *data = engine.allocate(kBytes), *fixed = engine.allocate(kBytes), *other = engine.allocate(kBytes);
        Bytes plain(kBytes);
        engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
        engine.open_region(kMem + 1, fixed, kBytes, KVL_ACCESS_READ);
        engine.open_region(kMem + 2, other, kBytes / 2, KVL_ACCESS_READ);
        engine.open_region(kMem + 3, other, kBytes, 0);
        engine.open_region(kMem + 4, plain.data(), kBytes, KVL_ACCESS_READ);
        kvl_link *link = open_link(engine, link_params(KVL_ROLE_ACCEPTOR));
        pipe.send(describe(link));
        pipe.await();
        provider().link_close(link, 0);
      });
}

// Links, imports and threads: as many afterwards as before.
void links(const char *path) {
  constexpr int kRounds = 100;
  const auto side = [path](Pipe &pipe, bool initiator) {
    TestEngine engine(kvlink::test::Options{{"path", path}});
    uint8_t *data = engine.allocate(kBytes);
    engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
    int descriptors = 0;
    for (int i = 0; i < kRounds; ++i) {
      kvl_link *link = connect_pair(engine, pipe, initiator);
      exchange_region(engine, link, pipe, kMem, kRemote);
      CHECK_EQ(transfer(engine, link, KVL_PUT, {{kMem, kRemote, 0, 0, kBytes}}).status, KVL_OK);
      pipe.signal();
      pipe.await();
      kvl_error err = make_error();
      CHECK_EQ(provider().link_check(link, &err), KVL_OK);
      pipe.signal();
      pipe.await();
      provider().rmem_close(link, kRemote);
      provider().link_close(link, 100);
      if (i == 10) descriptors = open_descriptors();
      if (i > 10) CHECK_EQ(open_descriptors(), descriptors);
    }
  };
  run_pair((std::string("a hundred links, ") + path).c_str(), [&](Pipe &pipe) { side(pipe, true); },
           [&](Pipe &pipe) { side(pipe, false); });
}

}  // namespace

int main() {
  registration();
  sharing();
  for (const char *path : host_paths()) links(path);
  return finish("memory");
}
