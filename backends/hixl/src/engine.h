// One open engine: a vendor engine that serves at an address of its own, its memory, its links, and their progress.
//
// Vendor calls: Connect, Disconnect, Initialize and Finalize run on threads that can be given up (VendorRunner);
// transfers are started and asked about by the engine's thread only, the one that sleeps in wait; registration runs in
// the caller's thread. Each enters the device's context and leaves the caller's as it was.
#ifndef KVLINK_HIXL_ENGINE_H
#define KVLINK_HIXL_ENGINE_H

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ascend/address.h"
#include "ascend/completions.h"
#include "ascend/event_loop.h"
#include "ascend/link_type.h"
#include "ascend/memory.h"
#include "ascend/runner.h"
#include "ascend/staging.h"
#include "hixl_memory.h"
#include "names.h"
#include "settings.h"
#include "vendor.h"

namespace kvlink::hixl_provider {

class Link;
struct LinkBlob;

// The vendor cuts a batch there too (HCCL takes no more in one call): cutting here keeps each call of poll short.
constexpr uint32_t kBatch = 256;
// Requests out at once: the vendor has 512 streams an engine, and every request of 8.5 holds one.
constexpr uint32_t kRequestsPerLink = 16;
constexpr uint32_t kRequestsPerEngine = 384;
// They take turns inside the vendor's library; each needs the peer's daemon, never the peer's turn, so none waits in a
// circle.
constexpr uint32_t kMostConnects = 16;
constexpr uint32_t kMostLinks = 256;  // the vendor allows 512 connections; a link has one each way

struct Statistics {
  std::atomic<uint64_t> put_bytes{0}, get_bytes{0}, requests{0}, descriptors{0};
  std::atomic<uint64_t> connects{0}, connect_retries{0}, disconnects{0}, links_lost{0};
  std::atomic<uint64_t> out_of_streams{0}, deferred{0}, late_memory_refused{0};
};

class Engine {
 public:
  static Failure open(const kvl_engine_params &params, std::unique_ptr<Engine> *out);
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  void query(kvl_attr *attr) const;
  Failure open_memory(uint32_t mem, const kvl_mem_desc &desc);
  // Memory that a peer still holds bound is given back with the engine, when nothing of the peer's can reach it.
  void free_memory(uint64_t address);
  Failure poll(kvl_completion *completions, uint32_t *count, uint32_t *more);
  void wait(uint32_t timeout_ms);
  void wake() { loop_.wake(); }
  void statistics(kvl_stat *out, uint32_t *count) const;

  // What this side says about itself in a link blob; `sequence` is that of its newest region.
  void introduce(LinkBlob *blob, uint64_t sequence) const;

  const Settings &settings() const { return settings_; }
  const std::string &name() const { return name_; }
  const std::shared_ptr<HixlEngine> &hixl() const { return hixl_; }
  const ascend::Device &device() const { return *device_; }
  ascend::Memory &memory() { return *memory_; }
  ascend::EventLoop &loop() { return loop_; }
  ascend::CompletionQueue &completions() { return completions_; }
  ascend::StagingArea &staging() { return *staging_; }
  ascend::VendorRunner &connector() { return *connector_; }
  ascend::VendorRunner &closer() { return *closer_; }
  Names &names() { return *names_; }
  Statistics &stats() { return stats_; }

  // I/O lock held.
  void add_link(Link *link) { links_.push_back(link); }
  void remove_link(Link *link);
  // An event that was recorded on a caller's stream: destroyed now, or when that stream has come to it.
  void retire_event(ascend::aclrtEvent event);
  std::atomic<uint32_t> &requests_out() { return requests_out_; }

 private:
  Engine() = default;
  Failure start(const kvl_engine_params &params);
  Failure serve();
  Failure serve_at(uint16_t port);
  Failure drop_anchor();
  void reap_events();
  ascend::MemoryRules memory_rules() const;

  Settings settings_;
  const kvlink_hixl_shim *shim_ = nullptr;
  ascend::LinkEnvironment environment_;
  std::shared_ptr<const ascend::Device> device_;
  ascend::DeviceAddress address_;
  std::shared_ptr<HixlEngine> hixl_;
  std::string name_;
  std::shared_ptr<Names> names_ = std::make_shared<Names>();
  Statistics stats_;
  ascend::EventLoop loop_;
  ascend::CompletionQueue completions_;
  std::unique_ptr<ascend::VendorRunner> connector_, closer_;
  std::unique_ptr<HixlMemory> vendor_memory_;
  std::unique_ptr<ascend::Memory> memory_;
  std::shared_ptr<ascend::Region> anchor_;
  std::unique_ptr<ascend::StagingArea> staging_;
  std::vector<ascend::aclrtEvent> events_;  // I/O lock
  std::vector<Link *> links_;               // I/O lock
  std::atomic<std::thread::id> thread_{};   // the engine's: the one that waits
  std::atomic<uint32_t> requests_out_{0};
  std::atomic<bool> in_flight_{false};
};

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_ENGINE_H
