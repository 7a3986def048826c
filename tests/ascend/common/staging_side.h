// One side of a staging test: a provider's data path in small, over a real side connection.
#ifndef KVLINK_TESTS_ASCEND_STAGING_SIDE_H
#define KVLINK_TESTS_ASCEND_STAGING_SIDE_H

#include <cstring>
#include <deque>
#include <thread>

#include "ascend/common/sim.h"
#include "ascend/side_accept.h"
#include "ascend/staging.h"

namespace kvlink::test {

using namespace kvlink::ascend;

inline Deadline in_ms(uint64_t ms) { return {now_ns() + ms * 1000000, -1}; }

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
class StagingSide : public BatchIssuer {
 public:
  StagingSide(std::shared_ptr<const Device> device, uint32_t role, uint64_t staging, uint8_t key = 9)
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
  ~StagingSide() override { shut(); }

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

  void import(uint32_t rmem, StagingSide &from, uint32_t mem) {
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
  StagingSide *peer = nullptr;
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

inline void join(StagingSide &a, StagingSide &b) {
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

}  // namespace kvlink::test

#endif  // KVLINK_TESTS_ASCEND_STAGING_SIDE_H
