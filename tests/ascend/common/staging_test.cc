// The staging area between two engines over a real side connection: every memory pair, bytes compared, hostile peers,
// bounded resources, cancel, loss, and nothing left behind.
#include "ascend/staging.h"

#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cstring>
#include <random>
#include <thread>

#include "ascend/common/sim.h"
#include "ascend/side_accept.h"
#include "ascend/staging_wire.h"

using namespace kvlink::ascend;
using namespace kvlink::test;
using kvlink::host::Deadline;

namespace {

Deadline in_ms(uint64_t ms) { return {now_ns() + ms * 1000000, -1}; }

// Registers like a vendor: what is not registered cannot be moved.
class Vendor : public VendorMemory {
 public:
  Failure register_memory(uint64_t address, uint64_t length, bool, void **handle) override {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges[address] = length;
    *handle = reinterpret_cast<void *>(address);
    return {};
  }
  Failure deregister_memory(void *handle) override {
    const std::lock_guard<std::mutex> lock(mutex);
    CHECK(ranges.erase(reinterpret_cast<uint64_t>(handle)) == 1);
    return {};
  }
  bool covers(uint64_t address, uint64_t length) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto next = ranges.upper_bound(address);
    if (next == ranges.begin()) return false;
    --next;
    return address + length <= next->first + next->second;
  }
  std::mutex mutex;
  std::map<uint64_t, uint64_t> ranges;
};

// A provider's data path in small: batches complete some polls later, in order, and move host memory of this process.
class Side : public BatchIssuer {
 public:
  Side(std::shared_ptr<const Device> device, uint32_t role, uint64_t staging, uint8_t key = 9)
      : device_(device), role_(role), params_(link_params(role, 7, key)) {
    options.host_staging = staging;
    options.host_staging_links = 2;
    CHECK(options.complete().ok());
    CHECK(loop.open().ok());
    MemoryRules rules;
    rules.stage_host = staging > 0;
    memory = std::make_unique<Memory>(device, vendor, rules, role == KVL_ROLE_INITIATOR ? "side A" : "side B");
    const Failure failure = StagingArea::open(device, options, *memory, loop, completions, 3, &area);
    if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
    CHECK(failure.ok());
    CHECK(area->open_link(params_, remotes, *this, &link).ok());
    thread_ = std::thread([this] { run(); });
  }
  ~Side() override { shut(); }

  void shut() {
    if (!thread_.joinable()) return;
    close_link();
    stop_.store(true);
    loop.wake();
    thread_.join();
    std::vector<uint32_t> open;
    memory->regions().each([&](const std::shared_ptr<Region> &region) { open.push_back(region->handle); });
    for (const uint32_t mem : open) CHECK(memory->close(mem).ok());
    area.reset();
    memory.reset();
    CHECK(vendor.ranges.empty());
  }

  void close_link() {
    if (link == nullptr) return;
    std::unique_ptr<StagingLink> gone;
    {
      const auto lock = loop.lock();
      link->stop(make_failure(KVL_CANCELLED, "link_close", "closed"));
      for (const Batch &batch : batches_)
        link->batch_done(batch.token, make_failure(KVL_CANCELLED, "link_close", "closed"));
      batches_.clear();
      link->release();
      gone = std::move(link);
    }
  }

  Failure issue(uint32_t operation, const Descriptor *descriptors, uint64_t count, uint64_t token) override {
    CHECK(count > 0 && count <= max_batch());
    if (fail_next.exchange(false)) return make_failure(KVL_LINK_DOWN, "HcclBatchPut", "the vendor failed");
    if (busy_next.exchange(false)) return make_failure(KVL_AGAIN, "issue", "no stream");
    for (uint64_t i = 0; i < count; ++i) {
      CHECK(vendor.covers(descriptors[i].local, descriptors[i].length));
      CHECK(peer->vendor.covers(descriptors[i].remote, descriptors[i].length));
    }
    batches_.push_back({operation, {descriptors, descriptors + count}, token, polls_ + 2});
    ++issued;
    return {};
  }
  uint64_t max_batch() const override { return 16; }

  kvl_completion await(uint64_t tag) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(30), [&] { return done_.count(tag) != 0; })) {
      std::fprintf(stderr, "transfer %llu did not complete\n", static_cast<unsigned long long>(tag));
      std::exit(1);
    }
    const kvl_completion got = done_[tag];
    done_.erase(tag);
    return got;
  }

  void open_region(uint32_t mem, void *address, uint64_t length, uint32_t access = 3) {
    kvl_mem_desc desc{};
    desc.struct_size = sizeof desc;
    desc.kind = KVL_MEMORY_HOST;
    desc.device = -1;
    desc.access = access;
    desc.address = reinterpret_cast<uint64_t>(address);
    desc.length = length;
    const Failure failure = memory->open(mem, desc);
    if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
    CHECK(failure.ok());
  }

  void import(uint32_t rmem, Side &from, uint32_t mem) {
    RegionBlob blob;
    uint64_t room = sizeof blob;
    CHECK(from.memory->describe(mem, &blob, &room).ok());
    auto remote = std::make_shared<RemoteRegion>();
    remote->handle = rmem;
    remote->access = blob.access;
    remote->address = blob.address;
    remote->length = blob.length;
    remote->staged = blob.staged != 0;
    remote->peer_mem = blob.mem;
    CHECK(remotes.insert(remote));
  }

  Failure submit(uint32_t operation, const std::vector<kvl_range> &ranges, uint64_t tag) {
    RangePlan plan;
    Failure failure = plan_ranges(memory->regions(), remotes, operation, ranges.data(), ranges.size(), &plan);
    if (failure.ok()) failure = link->admit(plan);
    if (!failure.ok()) return failure;
    link->enqueue(operation, ranges.data(), ranges.size(), tag, plan.bytes);
    loop.wake();
    return {};
  }

  kvl_completion transfer(uint32_t operation, const std::vector<kvl_range> &ranges) {
    const uint64_t tag = next_tag();
    const Failure failure = submit(operation, ranges, tag);
    if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
    CHECK(failure.ok());
    return await(tag);
  }

  uint64_t refused() const {
    uint64_t staged, served, count;
    area->statistics(&staged, &served, &count);
    return count;
  }

  CommonOptions options;
  EventLoop loop;
  CompletionQueue completions;
  Vendor vendor;
  std::unique_ptr<Memory> memory;
  std::unique_ptr<StagingArea> area;
  RemoteTable remotes;
  std::unique_ptr<StagingLink> link;
  Side *peer = nullptr;
  std::atomic<bool> fail_next{false}, busy_next{false}, hold{false};
  std::atomic<uint64_t> issued{0};

 private:
  struct Batch {
    uint32_t operation;
    std::vector<Descriptor> descriptors;
    uint64_t token;
    uint64_t due;
  };

  void run() {
    while (!stop_.load()) {
      bool more = false;
      uint32_t out = 0;
      {
        const auto lock = loop.lock();
        loop.dispatch(now_ns() + 300000);
        ++polls_;
        while (!batches_.empty() && batches_.front().due <= polls_ && !hold.load()) {
          const Batch batch = std::move(batches_.front());
          batches_.pop_front();
          for (const Descriptor &piece : batch.descriptors) {
            const bool put = batch.operation == KVL_PUT;
            move(put ? piece.remote : piece.local, put ? piece.local : piece.remote, piece.length);
          }
          if (link != nullptr) link->batch_done(batch.token, {});
        }
        if (link != nullptr) more = link->progress(now_ns() + 300000);
        out = static_cast<uint32_t>(batches_.size());
      }
      kvl_completion taken[16];
      uint32_t count = 16;
      bool left = false;
      completions.take(taken, &count, &left);
      if (count > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (uint32_t i = 0; i < count; ++i) CHECK(done_.emplace(taken[i].tag, taken[i]).second);
        changed_.notify_all();
      }
      if (!more && !left) loop.wait(60000, out > 0);
    }
  }

  // The arena may be device memory, which only the (simulated) device touches.
  void move(uint64_t to, uint64_t from, uint64_t length) {
    const ContextGuard guard = device_->enter();
    CHECK(guard.ok());
    const AclApi &acl = device_->acl();
    void *target = reinterpret_cast<void *>(to), *source = reinterpret_cast<void *>(from);
    const bool to_device = pointer_kind(acl, target) == PointerKind::kDevice;
    const bool from_device = pointer_kind(acl, source) == PointerKind::kDevice;
    if (!to_device && !from_device) {
      std::memcpy(target, source, length);
      return;
    }
    const aclrtMemcpyKind kind = !to_device    ? ACL_MEMCPY_DEVICE_TO_HOST
                                 : from_device ? ACL_MEMCPY_DEVICE_TO_DEVICE
                                               : ACL_MEMCPY_HOST_TO_DEVICE;
    CHECK(acl.aclrtMemcpy(target, length, source, length, kind) == ACL_SUCCESS);
  }

  const std::shared_ptr<const Device> device_;
  const uint32_t role_;
  const kvl_link_params params_;
  std::deque<Batch> batches_;
  uint64_t polls_ = 0;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, kvl_completion> done_;
  std::thread thread_;
};

void join(Side &a, Side &b) {
  a.peer = &b;
  b.peer = &a;
  StagingBlob blob_a, blob_b;
  a.link->describe(&blob_a);
  b.link->describe(&blob_b);
  Failure failure_b;
  std::thread other([&] { failure_b = b.link->connect(blob_a, in_ms(10000)); });
  const Failure failure_a = a.link->connect(blob_b, in_ms(10000));
  other.join();
  if (!failure_a.ok()) std::fprintf(stderr, "%s\n", failure_a.message.c_str());
  CHECK(failure_a.ok() && failure_b.ok());
}

constexpr uint64_t kArea = uint64_t{2} << 20;
constexpr uint64_t kLarge = 5000003;

uint8_t *page_of(std::vector<uint8_t> &room) {
  const auto at = reinterpret_cast<uint64_t>(room.data());
  return room.data() + (4096 - at % 4096) % 4096;
}

// Random ranges, many small and some larger than a chunk, in both directions, compared byte by byte.
void test_pairs(const std::shared_ptr<const Device> &device, bool staged_a, bool staged_b) {
  Side a(device, KVL_ROLE_INITIATOR, staged_a ? kArea : 0), b(device, KVL_ROLE_ACCEPTOR, staged_b ? kArea : 0);
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
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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
  const auto start = [&](Side &side, uint32_t operation, const kvl_range &range, std::vector<uint64_t> *tags) {
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
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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

// The peer's access bits and a region that is not staged cannot be reached through the side connection.
void test_denied_by_access(const std::shared_ptr<const Device> &device) {
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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

void test_peer_lost(const std::shared_ptr<const Device> &device) {
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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

// Whoever does not know the key gets nothing, keeps nothing and holds nobody up.
void test_strangers(const std::shared_ptr<const Device> &device) {
  Side b(device, KVL_ROLE_ACCEPTOR, kArea);
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
    Side b(device, KVL_ROLE_ACCEPTOR, kArea);
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
  Side b(device, KVL_ROLE_ACCEPTOR, uint64_t{16} << 20);
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

void test_windows_run_out(const std::shared_ptr<const Device> &device) {
  Side a(device, KVL_ROLE_INITIATOR, 0), b(device, KVL_ROLE_ACCEPTOR, kArea);
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
  Side a(device, KVL_ROLE_INITIATOR, 0), b(device, KVL_ROLE_ACCEPTOR, 0);
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
  Side a(device, KVL_ROLE_INITIATOR, kArea), b(device, KVL_ROLE_ACCEPTOR, kArea);
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
    test_broken_frames(device);
    test_large_request(device);
    CHECK_EQ(live("device_memory"), int64_t{0});
    setenv("HCCL_INTRA_ROCE_ENABLE", "1", 1);
    test_pairs(device, true, true);
    test_pairs(device, true, false);
    test_pairs(device, false, true);
    test_many_at_once(device);
    test_packing(device);
    test_failures(device);
    test_denied_by_access(device);
    test_peer_lost(device);
    test_strangers(device);
    test_broken_frames(device);
    test_large_request(device);
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
