// What the contract promises beyond the bytes: exactly one completion, cancel, close, revocation, refusals by name.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>

#include "harness.h"

using namespace kvlink::test;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kBytes = uint64_t{64} << 20;
constexpr uint32_t kMem = 3, kRemote = 5;

struct Peer {
  TestEngine engine;
  uint8_t *data;
  kvl_link *link;

  Peer(Pipe &pipe, bool initiator, const Options &options, uint32_t access = KVL_ACCESS_READ | KVL_ACCESS_WRITE)
      : engine(options), data(engine.allocate(kBytes)), link(nullptr) {
    engine.open_region(kMem, data, kBytes, access);
    link = connect_pair(engine, pipe, initiator);
    exchange_region(engine, link, pipe, kMem, kRemote);
  }
  ~Peer() {
    if (link != nullptr) provider().link_close(link, 500);
  }
};

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Several gigabytes: longer than any test waits.
std::vector<kvl_range> endless() {
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < 8192; ++i) ranges.push_back({kMem, kRemote, (i % 63) << 20, ((i + 7) % 63) << 20, 1 << 20});
  return ranges;
}

uint64_t start(Peer &peer, uint32_t operation, const std::vector<kvl_range> &ranges) {
  kvl_completion done{};
  kvl_error err = make_error();
  const uint64_t tag = next_tag();
  CHECK_EQ(provider().submit(peer.link, operation, ranges.data(), ranges.size(), 0, tag, &done, &err), KVL_OK);
  return tag;
}

void idle_side(Pipe &pipe, const Options &options) {
  Peer peer(pipe, false, options);
  pipe.signal();
  pipe.await();
}

void cancel(const char *path, uint32_t operation) {
  const Options options = {{"path", path}};
  run_pair((std::string("cancel, ") + path).c_str(),
           [&](Pipe &pipe) {
             Peer peer(pipe, true, options);
             pipe.await();
             const auto ranges = endless();
             const uint64_t tag = start(peer, operation, ranges);
             while (peer.engine.statistic(std::string(path) + "_bytes") == 0) std::this_thread::yield();
             CHECK(!peer.engine.completed(tag));
             provider().cancel(peer.link, 123456789);  // unknown: ignored
             const auto begin = Clock::now();
             provider().cancel(peer.link, tag);
             const kvl_completion done = peer.engine.await(tag);
             CHECK(seconds_since(begin) < 2);
             CHECK_EQ(done.status, KVL_CANCELLED);
             CHECK(done.bytes > 0 && done.bytes < uint64_t{8192} << 20);
             // The link goes on, and only what was counted moved.
             CHECK_EQ(transfer(peer.engine, peer.link, KVL_PUT, {{kMem, kRemote, 0, 0, 5000}}).status, KVL_OK);
             pipe.signal();
           },
           [&](Pipe &pipe) { idle_side(pipe, options); });
}

void close_in_flight(const char *path, uint32_t operation) {
  const Options options = {{"path", path}, {"threads", "2"}};
  run_pair((std::string("close with work in flight, ") + path).c_str(),
           [&](Pipe &pipe) {
             Peer peer(pipe, true, options);
             pipe.await();
             const auto ranges = endless();
             std::vector<uint64_t> tags;
             for (int i = 0; i < 5; ++i) tags.push_back(start(peer, operation, ranges));
             while (peer.engine.statistic(std::string(path) + "_bytes") == 0) std::this_thread::yield();
             const auto begin = Clock::now();
             provider().link_close(peer.link, 1000);
             peer.link = nullptr;
             CHECK(seconds_since(begin) < 2);
             // No local byte changes after the close.
             Bytes after(peer.data, peer.data + kBytes);
             for (const uint64_t tag : tags) {
               const kvl_completion done = peer.engine.await(tag);
               CHECK(done.status == KVL_CANCELLED || done.status == KVL_LINK_DOWN);
             }
             usleep(20000);
             CHECK_EQ(std::memcmp(after.data(), peer.data, kBytes), 0);
             pipe.signal();
           },
           [&](Pipe &pipe) { idle_side(pipe, options); });
}

// A region is closed while the peer puts into it over TCP: not a byte moves after mem_close returned.
void revoke_under_put() {
  const Options options = {{"path", "tcp"}};
  run_pair(
      "mem_close under a peer's put",
      [&](Pipe &pipe) {
        Peer peer(pipe, true, options);
        pipe.await();
        const auto ranges = endless();
        const uint64_t tag = start(peer, KVL_PUT, ranges);
        pipe.signal();
        const kvl_completion done = peer.engine.await(tag);
        CHECK(done.status == KVL_DENIED || done.status == KVL_LINK_DOWN);
        CHECK(std::strlen(done.message) > 0);
        pipe.await();
        pipe.signal();
      },
      [&](Pipe &pipe) {
        Peer peer(pipe, false, options);
        pipe.signal();
        pipe.await();
        while (peer.engine.statistic("tcp_served_bytes") < 10 << 20) std::this_thread::yield();
        kvl_error err = make_error();
        CHECK_EQ(provider().mem_close(peer.engine.get(), kMem, &err), KVL_OK);
        std::memset(peer.data, 0x55, kBytes);
        pipe.signal();
        pipe.await();
        for (uint64_t i = 0; i < kBytes; ++i) CHECK_EQ(peer.data[i], 0x55);
      });
}

void read_only(const char *path) {
  const Options options = {{"path", path}};
  run_pair((std::string("a read-only region, ") + path).c_str(),
           [&](Pipe &pipe) {
             Peer peer(pipe, true, options);
             fill(peer.data, kBytes, 8);
             const kvl_range range{kMem, kRemote, 0, 0, 1000};
             kvl_completion done{};
             kvl_error err = make_error();
             CHECK_EQ(provider().submit(peer.link, KVL_PUT, &range, 1, 0, next_tag(), &done, &err), KVL_DENIED);
             CHECK(std::strlen(err.message) > 0);
             pipe.await();
             CHECK_EQ(transfer(peer.engine, peer.link, KVL_GET, {range}).status, KVL_OK);
             for (uint64_t i = 0; i < 1000; ++i) CHECK_EQ(peer.data[i], pattern(4, i));
             pipe.signal();
           },
           [&](Pipe &pipe) {
             Peer peer(pipe, false, options, KVL_ACCESS_READ);
             fill(peer.data, kBytes, 4);
             pipe.signal();
             pipe.await();
           });
}

void forced_path_refusals() {
  run_pair(
      "a region that cannot go the forced way",
      [](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", "shm"}});
        Bytes plain(4096);
        engine.open_region(kMem, plain.data(), plain.size(), KVL_ACCESS_READ);
        kvl_link *link = connect_pair(engine, pipe, true);
        kvl_error err;
        CHECK_EQ(open_remote(link, kRemote, pipe.receive(), &err), KVL_UNSUPPORTED);
        CHECK(std::strstr(err.message, "path=shm") != nullptr);
        const Bytes garbage(40, 3);
        CHECK_EQ(open_remote(link, kRemote, garbage, &err), KVL_INVALID);
        CHECK_EQ(open_remote(link, kRemote, Bytes(), &err), KVL_INVALID);
        pipe.signal();
        provider().link_close(link, 0);
      },
      [](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", "shm"}});
        Bytes plain(4096);
        engine.open_region(kMem, plain.data(), plain.size(), KVL_ACCESS_READ);
        kvl_link *link = connect_pair(engine, pipe, false);
        pipe.send(engine.export_region(kMem));
        pipe.await();
        provider().link_close(link, 0);
      });
}

// One batch over shared memory and plain memory at once, and regions that were registered after the link.
void mixed_paths() {
  const auto side = [](Pipe &pipe, bool initiator) {
    Peer peer(pipe, initiator, {});
    Bytes plain(1 << 20);
    fill(plain.data(), plain.size(), initiator ? 1 : 2);
    fill(peer.data, kBytes, initiator ? 1 : 2);
    peer.engine.open_region(kMem + 1, plain.data(), plain.size(), KVL_ACCESS_READ | KVL_ACCESS_WRITE);
    exchange_region(peer.engine, peer.link, pipe, kMem + 1, kRemote + 1);
    if (initiator) {
      std::vector<kvl_range> ranges;
      for (uint64_t i = 0; i < 64; ++i) {
        ranges.push_back({kMem, kRemote, i * 8192, i * 8192, 4096});
        ranges.push_back({kMem + 1, kRemote + 1, i * 8192, i * 8192, 4096});
        ranges.push_back({kMem, kRemote, 0, 0, 0});
      }
      const kvl_completion done = transfer(peer.engine, peer.link, KVL_PUT, ranges);
      CHECK_EQ(done.status, KVL_OK);
      CHECK_EQ(done.path, have_cma() ? 1u : 2u);  // the slower of the two
      CHECK_EQ(transfer(peer.engine, peer.link, KVL_PUT, {{kMem, kRemote, 0, 0, 0}}).status, KVL_OK);
      pipe.signal();
      pipe.await();
    } else {
      pipe.await();
      for (uint64_t i = 0; i < plain.size(); ++i) {
        const uint64_t seed = i < 64 * 8192 && i % 8192 < 4096 ? 1 : 2;
        CHECK_EQ(plain[i], pattern(seed, i));
        CHECK_EQ(peer.data[i], pattern(seed, i));
      }
      pipe.signal();
    }
  };
  run_pair("one batch over two paths", [&](Pipe &pipe) { side(pipe, true); }, [&](Pipe &pipe) { side(pipe, false); });
}

// Both sides put and get as fast as they can, from several threads' worth of tags, and nothing locks up.
void both_directions(const char *path) {
  const auto side = [path](Pipe &pipe, bool initiator) {
    Peer peer(pipe, initiator, {{"path", path}});
    std::vector<std::vector<kvl_range>> batches;
    constexpr uint64_t kSlot = uint64_t{2} << 20, kUpper = kBytes / 2;
    for (uint64_t i = 0; i < 16; ++i) {
      // Every batch has its slot: sources in the lower halves, targets in the upper ones.
      std::vector<kvl_range> ranges;
      for (uint64_t j = 0; j < 100; ++j) {
        const uint64_t lower = i * kSlot + j * 20000, upper = kUpper + i * kSlot + j * 20001;
        const bool put = i % 2 == 0;
        ranges.push_back({kMem, kRemote, put ? lower : upper, put ? upper : lower, 19000 + i});
      }
      batches.push_back(ranges);
    }
    std::vector<uint64_t> tags;
    for (uint64_t i = 0; i < batches.size(); ++i)
      tags.push_back(start(peer, i % 2 == 0 ? KVL_PUT : KVL_GET, batches[i]));
    for (const uint64_t tag : tags) CHECK_EQ(peer.engine.await(tag, 60000).status, KVL_OK);
    pipe.signal();
    pipe.await();
  };
  run_pair((std::string("both directions at once, ") + path).c_str(), [&](Pipe &pipe) { side(pipe, true); },
           [&](Pipe &pipe) { side(pipe, false); });
}

void interrupt_connect() {
  run_pair(
      "link_interrupt",
      [](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", "tcp"}});
        kvl_link *link = open_link(engine, link_params(KVL_ROLE_INITIATOR));
        const Bytes blob = pipe.receive();
        std::thread connecting([&] {
          kvl_error err = make_error();
          CHECK_EQ(provider().link_connect(link, blob.data(), blob.size(), 20000, &err), KVL_CANCELLED);
        });
        usleep(100000);  // most runs then interrupt a wait, some the step before it: both must end it
        const auto begin = Clock::now();
        provider().link_interrupt(link);
        connecting.join();
        CHECK(seconds_since(begin) < 1);
        provider().link_close(link, 0);
        kvl_link *second = open_link(engine, link_params(KVL_ROLE_INITIATOR));
        kvl_error err = make_error();
        CHECK_EQ(provider().link_connect(second, blob.data(), blob.size(), 200, &err), KVL_TIMEOUT);
        provider().link_close(second, 0);
        pipe.signal();
      },
      [](Pipe &pipe) {
        TestEngine engine(kvlink::test::Options{{"path", "tcp"}});
        kvl_link *link = open_link(engine, link_params(KVL_ROLE_ACCEPTOR));
        engine.pause();  // accepts, by the kernel, and answers nothing
        pipe.send(describe(link));
        pipe.await();
        engine.resume();
        provider().link_close(link, 0);
      });
}

void options() {
  const struct {
    const char *name;
    const char *value;
    const char *expected;
  } cases[] = {{"strems", "2", "'streams'"},
               {"path", "rdma", "auto, shm, cma or tcp"},
               {"streams", "0", "from 1"},
               {"streams", "two", "whole number"},
               {"threads", "-1", "whole number"},
               {"bind_host", "", "host name"},
               {"bind_host", "no.such.host.invalid", "resolve"}};
  for (const auto &item : cases) {
    const kvl_option option{item.name, item.value};
    const kvl_engine_params params{sizeof params, 1, &option, "cpu"};
    kvl_engine *engine = nullptr;
    kvl_error err = make_error();
    CHECK_EQ(provider().engine_open(&params, &engine, &err), KVL_INVALID);
    if (std::strstr(err.message, item.expected) == nullptr) std::fprintf(stderr, "%s\n", err.message);
    CHECK(std::strstr(err.message, item.expected) != nullptr);
  }
  kvl_provider table{};
  table.struct_size = sizeof table;
  kvl_error err = make_error();
  CHECK_EQ(kvl_provider_init(KVL_ABI_VERSION + 1, &table, &err), KVL_UNSUPPORTED);
}

}  // namespace

int main() {
  options();
  for (const char *path : host_paths()) {
    cancel(path, KVL_PUT);
    cancel(path, KVL_GET);
    close_in_flight(path, KVL_PUT);
    close_in_flight(path, KVL_GET);
    read_only(path);
    both_directions(path);
  }
  revoke_under_put();
  forced_path_refusals();
  mixed_paths();
  interrupt_connect();
  return finish("semantics");
}
