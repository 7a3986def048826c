// The staging area between two engines over a real side connection: every memory pair, bytes compared, bounded
// resources, cancel, loss, and nothing left behind.
#include <sys/resource.h>

#include <cstring>
#include <random>
#include <thread>

#include "ascend/common/staging_side.h"

using namespace kvlink::test;

namespace {

constexpr uint64_t kLarge = 5000003;

uint8_t *page_of(std::vector<uint8_t> &room) {
  const auto at = reinterpret_cast<uint64_t>(room.data());
  return room.data() + (4096 - at % 4096) % 4096;
}

// Random ranges, many small and some larger than a chunk, in both directions, compared byte by byte.
void test_pairs(const std::shared_ptr<const Device> &device, bool staged_a, bool staged_b) {
  StagingSide a(device, KVL_ROLE_INITIATOR, staged_a ? kArea : 0), b(device, KVL_ROLE_ACCEPTOR, staged_b ? kArea : 0);
  join(a, b);
  // Unaligned where it is staged; a vendor that registers host memory wants whole pages.
  std::vector<uint8_t> room_a(kLarge + 8192), room_b(kLarge + 8192);
  uint8_t *const memory_a = page_of(room_a) + (staged_a ? 1 : 0), *const memory_b =
                                                                      page_of(room_b) + (staged_b ? 1 : 0);
  a.open_region(1, memory_a, kLarge);
  b.open_region(5, memory_b, kLarge);
  a.import(2, b, 5);
  CHECK(a.memory->regions().get(1)->staged == staged_a && a.remotes.get(2)->staged == staged_b);
  std::mt19937_64 random(11);
  for (int round = 0; round < 12; ++round) {
    fill(room_a.data(), room_a.size(), random());
    fill(room_b.data(), room_b.size(), random());
    std::vector<uint8_t> wanted_a = room_a, wanted_b = room_b;
    uint8_t *const want_a = &wanted_a[static_cast<size_t>(memory_a - room_a.data())];
    uint8_t *const want_b = &wanted_b[static_cast<size_t>(memory_b - room_b.data())];
    const uint32_t operation = round % 2 == 0 ? KVL_PUT : KVL_GET;
    std::vector<kvl_range> ranges;
    const uint64_t count = round < 4 ? 1 : 1 + random() % 100;
    for (uint64_t i = 0; i < count; ++i) {
      // Disjoint on both sides, so that order does not matter.
      const uint64_t slot = kLarge / count, most = slot - (slot > 100 ? 100 : 0);
      const uint64_t length = random() % 5 == 0 ? 0 : 1 + random() % most;
      const uint64_t at = i * slot + random() % (slot - length),
                     to = (count - 1 - i) * slot + random() % (slot - length);
      ranges.push_back({1, 2, at, to, length});
      if (operation == KVL_PUT) std::memcpy(want_b + to, want_a + at, length);
      if (operation == KVL_GET) std::memcpy(want_a + at, want_b + to, length);
    }
    uint64_t bytes = 0;
    for (const kvl_range &range : ranges) bytes += range.length;
    const kvl_completion done = a.transfer(operation, ranges);
    if (done.status != KVL_OK) std::fprintf(stderr, "%s: %s\n", done.site, done.message);
    CHECK_EQ(done.status, KVL_OK);
    CHECK_EQ(done.bytes, bytes);
    CHECK_EQ(done.path, 3u);
    CHECK(room_a == wanted_a && room_b == wanted_b);
  }
  a.shut();
  b.shut();
}

// Both sides at once over one link, many more submits than parts.
void test_many_at_once(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  constexpr uint64_t block = 300000, blocks = 12;
  std::vector<uint8_t> from_a(block * blocks), to_a(block * blocks), from_b(block * blocks), to_b(block * blocks),
      copy_of_a(block * blocks);
  fill(from_a.data(), from_a.size(), 1);
  fill(from_b.data(), from_b.size(), 2);
  a.open_region(1, from_a.data(), from_a.size(), KVL_ACCESS_READ);
  a.open_region(2, to_a.data(), to_a.size(), 0);
  b.open_region(1, from_b.data(), from_b.size(), KVL_ACCESS_READ);
  b.open_region(2, to_b.data(), to_b.size(), KVL_ACCESS_WRITE);
  b.open_region(3, copy_of_a.data(), copy_of_a.size(), 0);
  a.import(1, b, 1);
  a.import(2, b, 2);
  b.import(1, a, 1);
  std::vector<std::vector<kvl_range>> kept;
  std::vector<uint64_t> tags_a, tags_b;
  const auto start = [&](StagingSide &side, uint32_t operation, const kvl_range &range, std::vector<uint64_t> *tags) {
    kept.push_back({range});
    tags->push_back(next_tag());
    CHECK(side.submit(operation, kept.back(), tags->back()).ok());
  };
  for (uint64_t i = 0; i < blocks; ++i) {
    start(a, KVL_PUT, {1, 2, i * block, i * block, block}, &tags_a);
    start(a, KVL_GET, {2, 1, i * block, i * block, block}, &tags_a);
    start(b, KVL_GET, {3, 1, i * block, i * block, block}, &tags_b);
  }
  for (const uint64_t tag : tags_a) CHECK_EQ(a.await(tag).status, KVL_OK);
  for (const uint64_t tag : tags_b) CHECK_EQ(b.await(tag).status, KVL_OK);
  CHECK(to_b == from_a && to_a == from_b && copy_of_a == from_a);
  CHECK(a.link->transfers() == 0 && b.link->transfers() == 0);
  // Wider than the limit of transfers under way: AGAIN, not a queue without end.
  b.hold.store(true);
  a.hold.store(true);
  std::vector<uint64_t> tags;
  Failure failure;
  while (failure.ok()) {
    kept.push_back({{1, 2, 0, 0, block}});
    tags.push_back(next_tag());
    failure = a.submit(KVL_PUT, kept.back(), tags.back());
  }
  tags.pop_back();
  CHECK(failure.status == KVL_AGAIN);
  CHECK_EQ(tags.size(), a.options.max_in_flight);
  a.hold.store(false);
  a.loop.wake();
  for (const uint64_t tag : tags) CHECK_EQ(a.await(tag).status, KVL_OK);
}

// Small ranges are packed: one descriptor for the vendor where both sides are staged.
void test_packing(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  std::vector<uint8_t> from(100000), to(100000);
  fill(from.data(), from.size(), 3);
  a.open_region(1, from.data(), from.size());
  b.open_region(1, to.data(), to.size());
  a.import(1, b, 1);
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < 160; ++i) ranges.push_back({1, 1, i * 600, i * 500 + 7, 100});
  CHECK_EQ(a.transfer(KVL_PUT, ranges).status, KVL_OK);
  CHECK_EQ(a.issued.load(), uint64_t{10});  // 16 ranges a batch
  for (uint64_t i = 0; i < 160; ++i) CHECK(std::memcmp(&from[i * 600], &to[i * 500 + 7], 100) == 0);
}

void test_failures(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  std::vector<uint8_t> from(1 << 20), to(1 << 20);
  a.open_region(1, from.data(), from.size());
  b.open_region(1, to.data(), to.size());
  a.import(1, b, 1);
  // No stream is free at first: it is tried again.
  a.busy_next.store(true);
  CHECK_EQ(a.transfer(KVL_PUT, {{1, 1, 0, 0, 100}}).status, KVL_OK);
  // The vendor refuses: the transfer ends with its words, the next one goes.
  a.fail_next.store(true);
  const kvl_completion failed = a.transfer(KVL_PUT, {{1, 1, 0, 0, 1 << 20}});
  CHECK(failed.status == KVL_LINK_DOWN && std::string(failed.site) == "HcclBatchPut");
  CHECK_EQ(a.transfer(KVL_GET, {{1, 1, 0, 0, 1 << 20}}).status, KVL_OK);
  // The peer closed its region meanwhile.
  CHECK(b.memory->close(1).ok());
  std::fill(to.begin(), to.end(), uint8_t{9});
  const kvl_completion denied = a.transfer(KVL_PUT, {{1, 1, 0, 0, 1 << 20}});
  CHECK(denied.status == KVL_DENIED && std::string(denied.message).find("published") != std::string::npos);
  CHECK_EQ(a.transfer(KVL_GET, {{1, 1, 0, 0, 10}}).status, KVL_DENIED);
  CHECK(std::all_of(to.begin(), to.end(), [](uint8_t byte) { return byte == 9; }));
  CHECK(b.refused() >= 2);
  CHECK(a.link->check().ok());
  // Cancel: what has begun ends, nothing new begins.
  b.open_region(1, to.data(), to.size());
  a.hold.store(true);
  const std::vector<kvl_range> ranges{{1, 1, 0, 0, 1 << 20}};
  const uint64_t tag = next_tag();
  CHECK(a.submit(KVL_PUT, ranges, tag).ok());
  a.link->cancel(tag);
  a.link->cancel(tag + 1000);
  a.hold.store(false);
  a.loop.wake();
  CHECK_EQ(a.await(tag).status, KVL_CANCELLED);
}

void test_peer_lost(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  std::vector<uint8_t> from(1 << 20), to(1 << 20);
  a.open_region(1, from.data(), from.size());
  b.open_region(1, to.data(), to.size());
  a.import(1, b, 1);
  a.hold.store(true);
  const std::vector<kvl_range> ranges{{1, 1, 0, 0, 1 << 20}};
  const uint64_t tag = next_tag(), fetch = next_tag();
  CHECK(a.submit(KVL_PUT, ranges, tag).ok());
  b.close_link();
  const uint64_t until = now_ns() + uint64_t{10} * 1000000000;
  while (a.link->check().ok() && now_ns() < until) std::this_thread::yield();
  CHECK(a.link->check().status == KVL_LINK_DOWN);
  CHECK(a.submit(KVL_GET, ranges, fetch).status == KVL_LINK_DOWN);
  a.hold.store(false);  // only now the vendor is done with the memory, and the transfer may end
  a.loop.wake();
  CHECK_EQ(a.await(tag).status, KVL_LINK_DOWN);
}

void test_windows_run_out(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, 0), b(device, KVL_ROLE_ACCEPTOR, kArea);
  std::unique_ptr<StagingLink> second, third;
  RemoteTable none;
  CHECK(b.area->open_link(link_params(KVL_ROLE_ACCEPTOR, 50), none, b, &second).ok());
  CHECK(b.area->open_link(link_params(KVL_ROLE_ACCEPTOR, 51), none, b, &third).ok());
  StagingBlob blob;
  third->describe(&blob);
  CHECK(blob.enabled == 1 && blob.window_length == 0);  // two links may be served, and the third is told
  third->connect(blob, in_ms(1));
  RangePlan plan;
  plan.staged_remote = true;
  const Failure failure = a.link->admit(plan);
  CHECK(failure.status == KVL_UNSUPPORTED && failure.message.find("host_staging_links") != std::string::npos);
  {
    const auto lock = b.loop.lock();
    second->release();
  }
  second.reset();
  CHECK(b.area->open_link(link_params(KVL_ROLE_ACCEPTOR, 52), none, b, &second).ok());
  second->describe(&blob);
  CHECK(blob.window_length > 0);
  for (auto *link : {&second, &third}) {
    const auto lock = b.loop.lock();
    (*link)->release();
  }
  second.reset();
  third.reset();
}

// A link that was never released keeps its part of the arena, and the arena stays.
void test_unreleased(const std::shared_ptr<const Device> &device) {
  const int64_t before = live("host_memory");
  Vendor vendor;
  Memory memory(device, vendor, {}, "the test");
  EventLoop loop;
  CHECK(loop.open().ok());
  CompletionQueue completions;
  CommonOptions options;
  options.host_staging = kArea;
  CHECK(options.complete().ok());
  std::unique_ptr<StagingArea> area;
  CHECK(StagingArea::open(device, options, memory, loop, completions, 0, &area).ok());
  CHECK(area->enabled());
  CHECK_EQ(live("host_memory"), before + 1);
  class Nothing : public BatchIssuer {
    Failure issue(uint32_t, const Descriptor *, uint64_t, uint64_t) override { return {}; }
    uint64_t max_batch() const override { return 1; }
  } issuer;
  RemoteTable remotes;
  std::unique_ptr<StagingLink> link;
  CHECK(area->open_link(link_params(KVL_ROLE_ACCEPTOR), remotes, issuer, &link).ok());
  link.reset();
  area.reset();
  CHECK_EQ(vendor.ranges.size(), size_t{1});
  CHECK_EQ(live("host_memory"), before + 1);
  CHECK(Registry::process()
            .release({0, vendor.ranges.begin()->first, kArea, false}, [](void *) { return Failure{}; })
            .ok());
}

// The options are refused before anything is allocated.
void test_too_small(const std::shared_ptr<const Device> &device) {
  Vendor vendor;
  Memory memory(device, vendor, {}, "the test");
  EventLoop loop;
  CHECK(loop.open().ok());
  CompletionQueue completions;
  CommonOptions options;
  options.host_staging = 1 << 20;
  options.host_staging_links = 64;
  std::unique_ptr<StagingArea> area;
  const Failure failure = StagingArea::open(device, options, memory, loop, completions, 0, &area);
  CHECK(failure.status == KVL_INVALID && failure.message.find("8388608") != std::string::npos);
}

// Two sides without an area need no side connection and no thread.
void test_off(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, 0), b(device, KVL_ROLE_ACCEPTOR, 0);
  join(a, b);
  StagingBlob blob;
  a.link->describe(&blob);
  CHECK(blob.enabled == 0 && blob.port == 0 && blob.window_length == 0);
  CHECK(!a.area->enabled());
}

uint64_t process_cpu_ns() {
  rusage usage{};
  CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
  const auto ns = [](const timeval &time) {
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_usec) * 1000u;
  };
  return ns(usage.ru_utime) + ns(usage.ru_stime);
}

// A connected, idle pair sleeps.
void test_idle(const std::shared_ptr<const Device> &device) {
  StagingSide a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
  join(a, b);
  EventLoop clock;
  CHECK(clock.open().ok());
  clock.wait(50, false);
  const uint64_t before = process_cpu_ns();
  clock.wait(1000, false);
  CHECK(process_cpu_ns() - before < uint64_t{30} * 1000000);
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
    unsetenv("HCCL_INTRA_ROCE_ENABLE");
    test_pairs(device, true, true);
    test_pairs(device, true, false);
    test_pairs(device, false, true);
    test_many_at_once(device);
    test_failures(device);
    CHECK_EQ(live("device_memory"), int64_t{0});
    setenv("HCCL_INTRA_ROCE_ENABLE", "1", 1);
    test_pairs(device, true, true);
    test_pairs(device, true, false);
    test_pairs(device, false, true);
    test_many_at_once(device);
    test_packing(device);
    test_failures(device);
    test_peer_lost(device);
    test_windows_run_out(device);
    test_too_small(device);
    test_off(device);
    test_idle(device);
    CHECK_EQ(open_descriptors(), descriptors);
    CHECK_EQ(Registry::process().size(), size_t{0});
    CHECK_EQ(live("host_memory"), int64_t{0});
    test_unreleased(device);
  }
  std::puts("staging: passed");
  return 0;
}
