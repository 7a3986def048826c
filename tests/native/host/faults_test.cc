// A peer that dies in the middle, and a host that forbids process_vm_readv.
#include <grp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <cstring>

#include "harness.h"

using namespace kvlink::test;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kBytes = uint64_t{64} << 20;
constexpr uint32_t kMem = 3, kRemote = 5;

std::vector<kvl_range> endless() {
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < 8192; ++i) ranges.push_back({kMem, kRemote, (i % 63) << 20, ((i + 7) % 63) << 20, 1 << 20});
  return ranges;
}

void killed(const char *path, uint32_t operation, bool initiator_survives) {
  const Options options = {{"path", path}, {"threads", "2"}};
  run_pair((std::string("SIGKILL in the middle, ") + path).c_str(),
           [&](Pipe &pipe) {
             expect_child_killed();
             TestEngine engine(options);
             uint8_t *data = engine.allocate(kBytes);
             engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
             kvl_link *link = connect_pair(engine, pipe, initiator_survives);
             exchange_region(engine, link, pipe, kMem, kRemote);
             const auto ranges = endless();
             std::vector<uint64_t> tags;
             for (int i = 0; i < 3; ++i) {
               tags.push_back(next_tag());
               kvl_completion done{};
               kvl_error err = make_error();
               CHECK_EQ(provider().submit(link, operation, ranges.data(), ranges.size(), 0, tags.back(), &done, &err),
                        KVL_OK);
             }
             while (engine.statistic(std::string(path) + "_bytes") == 0) std::this_thread::yield();
             kill(child_pid(), SIGKILL);
             const auto begin = Clock::now();
             for (const uint64_t tag : tags) {
               const kvl_completion done = engine.await(tag, 2000);
               CHECK_EQ(done.status, KVL_LINK_DOWN);
               CHECK(std::strlen(done.message) > 0);
             }
             CHECK(std::chrono::duration<double>(Clock::now() - begin).count() < 2);
             kvl_error err = make_error();
             CHECK_EQ(provider().link_check(link, &err), KVL_LINK_DOWN);
             kvl_completion done{};
             CHECK_EQ(provider().submit(link, operation, ranges.data(), 1, 0, next_tag(), &done, &err), KVL_LINK_DOWN);
             CHECK_EQ(open_remote(link, kRemote + 1, engine.export_region(kMem), &err), KVL_LINK_DOWN);
             provider().link_close(link, 1000);
           },
           [&](Pipe &pipe) {
             TestEngine engine(options);
             uint8_t *data = engine.allocate(kBytes);
             engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
             kvl_link *link = connect_pair(engine, pipe, !initiator_survives);
             exchange_region(engine, link, pipe, kMem, kRemote);
             for (;;) pause();
           });
}

// The child runs as another user, or refuses to be read: plain memory goes over TCP, allocated memory stays shared.
void forbidden(const char *name, const std::function<void()> &restrict_child, bool parent_can_read) {
  const auto side = [&](Pipe &pipe, bool initiator) {
    if (!initiator) restrict_child();
    TestEngine engine(kvlink::test::Options{});
    Bytes plain(1 << 20);
    fill(plain.data(), plain.size(), initiator ? 1 : 2);
    uint8_t *shared = engine.allocate(1 << 20);
    fill(shared, 1 << 20, initiator ? 1 : 2);
    engine.open_region(kMem, plain.data(), plain.size(), KVL_ACCESS_READ | KVL_ACCESS_WRITE);
    engine.open_region(kMem + 1, shared, 1 << 20, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
    kvl_link *link = connect_pair(engine, pipe, initiator);
    exchange_region(engine, link, pipe, kMem, kRemote);
    exchange_region(engine, link, pipe, kMem + 1, kRemote + 1);
    const auto go = [&] {
      const uint32_t expected = initiator && parent_can_read && have_cma() ? 1 : 2;
      kvl_completion done = transfer(engine, link, KVL_GET, {{kMem, kRemote, 0, 0, 200000}});
      CHECK_EQ(done.status, KVL_OK);
      CHECK_EQ(done.path, expected);
      for (uint64_t i = 0; i < 200000; ++i) CHECK_EQ(plain[i], pattern(initiator ? 2 : 1, i));
      fill(plain.data(), plain.size(), initiator ? 1 : 2);
      done = transfer(engine, link, KVL_GET, {{kMem + 1, kRemote + 1, 0, 0, 200000}});
      CHECK_EQ(done.status, KVL_OK);
      CHECK_EQ(done.path, 0u);
      for (uint64_t i = 0; i < 200000; ++i) CHECK_EQ(shared[i], pattern(initiator ? 2 : 1, i));
      fill(shared, 1 << 20, initiator ? 1 : 2);
    };
    if (initiator) go();
    pipe.signal();
    pipe.await();
    if (!initiator) go();
    pipe.signal();
    pipe.await();
    provider().link_close(link, 500);
  };
  run_pair(name, [&](Pipe &pipe) { side(pipe, true); }, [&](Pipe &pipe) { side(pipe, false); });
}

void become_nobody() {
  CHECK_EQ(setgroups(0, nullptr), 0);
  CHECK_EQ(setgid(65534), 0);
  CHECK_EQ(setuid(65534), 0);
}

}  // namespace

int main() {
  for (const char *path : host_paths()) {
    killed(path, KVL_PUT, true);
    killed(path, KVL_GET, false);
  }
  if (geteuid() == 0) {
    forbidden("a peer of another user", become_nobody, true);
  } else {
    std::printf("skipped: another user (needs root)\n");
    forbidden("a peer that may not be read", [] { CHECK_EQ(prctl(PR_SET_DUMPABLE, 0), 0); }, false);
  }
  return finish("faults");
}
