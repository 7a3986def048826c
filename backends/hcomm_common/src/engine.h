// One open engine: a device, the vendor's library, this side's memory, its links, and the progress that poll drives.
#ifndef KVLINK_HCOMM_ENGINE_H
#define KVLINK_HCOMM_ENGINE_H

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ascend/address.h"
#include "ascend/completions.h"
#include "ascend/event_loop.h"
#include "ascend/memory.h"
#include "ascend/runner.h"
#include "ascend/staging.h"
#include "ascend/streams.h"
#include "blob.h"
#include "options.h"
#include "vendor.h"

namespace kvlink::hcomm {

class Link;

// The order is that of kvl_provider.path_names.
constexpr const char *kPathNames[] = {"roce", "hccs", "staged"};
constexpr uint32_t kPathCount = 3;
constexpr uint32_t kStagedPath = 2;

struct Statistics {
  std::atomic<uint64_t> put_bytes{0}, get_bytes{0};
  std::atomic<uint64_t> submits{0}, batches{0}, descriptors{0};
  std::atomic<uint64_t> stream_failures{0}, cancelled{0};
  std::atomic<uint64_t> connects{0}, connect_retries{0}, links_stuck{0};
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  static Failure open(const kvl_engine_params &params, std::shared_ptr<Engine> *engine);
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  void query(kvl_attr *attr) const;
  void poll(kvl_completion *completions, uint32_t *count, uint32_t *more);
  void wait(uint32_t timeout_ms);
  void statistics(kvl_stat *out, uint32_t *count) const;
  // The core is done with it: waits a moment for threads that give streams back. Those inside a vendor call that hangs
  // keep what they use.
  void shut();

  // Runs on a thread of its own, the device's context current; keeps the engine alive until it returns.
  void spawn(std::function<void()> job);
  void describe(LinkBlob *blob) const;
  void add_link(const std::shared_ptr<Link> &link);
  void remove_link(const Link *link);

  const std::shared_ptr<const Vendor> &vendor() const { return vendor_; }
  const Options &options() const { return options_; }
  ascend::Memory &memory() { return *memory_; }
  ascend::EventLoop &loop() { return loop_; }
  ascend::CompletionQueue &completions() { return completions_; }
  ascend::StreamPool &lanes() { return *lanes_; }
  ascend::VendorRunner &runner() { return *runner_; }
  ascend::StagingArea &staging() { return *staging_; }
  Statistics &stats() { return stats_; }
  uint32_t max_batch() const { return max_batch_; }
  // Only poll's thread uses it.
  ascend::HcclOneSideOpDesc *batch() { return batch_.data(); }
  // Transfers with work on the device or waiting for it: poll and wait need not look when there are none.
  std::atomic<uint32_t> &work() { return work_; }
  // A transfer went to the staging area: poll drives it until its link has none left.
  void note_staged() { staged_.store(true); }

 private:
  // The process-granular table; nothing to do in the other flavour.
  class Registrar : public ascend::VendorMemory {
   public:
    explicit Registrar(const Vendor &vendor) : vendor_(vendor) {}
    Failure register_memory(uint64_t address, uint64_t length, bool on_device, void **handle) override;
    Failure deregister_memory(void *handle) override;

   private:
    const Vendor &vendor_;
  };

  Engine() = default;
  Failure start(const kvl_engine_params &params);

  Options options_;
  std::shared_ptr<const Vendor> vendor_;
  ascend::DeviceAddress address_;
  bool intra_roce_ = false;
  uint32_t max_batch_ = ascend::kHcclMaxBatch;
  Statistics stats_;
  ascend::EventLoop loop_;
  ascend::CompletionQueue completions_;
  std::unique_ptr<Registrar> registrar_;
  std::unique_ptr<ascend::Memory> memory_;
  std::unique_ptr<ascend::StreamPool> lanes_;
  std::unique_ptr<ascend::VendorRunner> runner_;
  std::unique_ptr<ascend::StagingArea> staging_;
  std::array<ascend::HcclOneSideOpDesc, ascend::kHcclMaxBatch> batch_{};
  std::atomic<uint32_t> work_{0};
  std::atomic<bool> staged_{false};

  std::mutex links_mutex_;  // guards the next two
  std::vector<std::shared_ptr<Link>> links_;
  uint64_t links_version_ = 0;
  std::vector<std::shared_ptr<Link>> polled_;  // poll's own copy
  uint64_t polled_version_ = 0;

  std::mutex threads_mutex_;
  std::condition_variable threads_changed_;
  uint32_t threads_ = 0;
};

// Can this process use the provider? Loads the vendor's libraries; called in a child process.
Failure probe_host();

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_ENGINE_H
