// Inside the staging area: what its translation units share.
#ifndef KVLINK_ASCEND_STAGING_IMPL_H
#define KVLINK_ASCEND_STAGING_IMPL_H

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ascend/side_accept.h"
#include "ascend/side_connection.h"
#include "ascend/staging.h"

namespace kvlink::ascend {

constexpr uint32_t kNoPart = UINT32_MAX;
constexpr uint64_t kMaxStepBytes = uint64_t{1} << 20;
constexpr uint64_t kLeastWindow = 64 * 1024;
constexpr uint64_t kPage = 4096;

// Equal parts of a piece of memory, taken and given back.
class Parts {
 public:
  void reset(uint64_t base, uint64_t part_bytes, uint32_t count);
  uint32_t take();  // kNoPart when all are in use
  void give(uint32_t part) { free_.push_back(part); }
  uint64_t address(uint32_t part) const { return base_ + part * bytes_; }
  uint64_t bytes() const { return bytes_; }
  bool whole() const { return free_.size() == count_; }

 private:
  uint64_t base_ = 0, bytes_ = 0;
  uint32_t count_ = 0;
  std::vector<uint32_t> free_;
};

// A piece of a staged region, which is plain host memory.
struct RegionPiece {
  uint64_t address;
  uint64_t length;
};

class StagingArea::Impl final : public SideDirectory {
 public:
  Impl(std::shared_ptr<const Device> device, Memory &memory, EventLoop &loop, CompletionQueue &completions,
       uint32_t path, const CommonOptions &options);
  Failure start();
  void close();

  // Between pieces and [place, ...) of the arena, where they lie one after the other. I/O lock held.
  Failure gather(uint64_t place, const RegionPiece *pieces, size_t count);   // pieces -> arena
  Failure scatter(uint64_t place, const RegionPiece *pieces, size_t count);  // arena -> pieces

  const SessionKey *find_key(const SessionId &session) override;
  void admit(const SessionId &session, UniqueFd socket) override;
  void refused() override { refused_.fetch_add(1); }
  void remove(StagingLink::Impl *link);

  Memory &memory;
  EventLoop &loop;
  CompletionQueue &completions;
  const uint32_t path;
  const CommonOptions options;
  std::unique_ptr<SideListener> listener;
  uint64_t arena = 0, arena_bytes = 0;
  bool on_device = false;  // the arena is device memory, which HCCS links reach
  uint64_t scratch = 0;    // pinned; what goes to device memory or comes from it passes through here in one copy
  uint64_t scratch_bytes = 0;
  std::shared_ptr<Region> region;
  Parts chunks, windows;
  bool starving = false;  // some link waits for a chunk
  std::vector<StagingLink::Impl *> links;
  std::atomic<uint64_t> staged_bytes{0}, served_bytes{0}, refused_{0};

 private:
  Failure copy_device(uint64_t place, uint64_t length, bool to_device);

  const std::shared_ptr<const Device> device_;
};

// A submit on its way through the area.
struct StagedJob {
  uint32_t operation = KVL_PUT;
  const kvl_range *ranges = nullptr;  // the core's, valid until the completion
  uint64_t count = 0;
  uint64_t tag = 0;
  uint64_t bytes = 0;
  uint64_t next = 0, offset = 0;  // where the next step begins
  uint32_t steps = 0;             // begun and not ended
  bool ended = false;             // no more steps begin
  Failure failure;                // the first one
};

// One vendor batch of a job, with the copies before and after it.
struct Step {
  enum class Phase { kReady, kVendor, kAnswer };
  StagedJob *job = nullptr;
  uint64_t token = 0;
  Phase phase = Phase::kReady;
  uint32_t chunk = kNoPart, slot = kNoPart;
  std::vector<Descriptor> batch;
  std::vector<RegionPiece> copies;  // in the order in which they lie in the chunk
  std::vector<SideEntry> table;     // of the peer's staged regions
};

class StagingLink::Impl final : public SideHandler {
 public:
  Impl(StagingArea::Impl &area, const kvl_link_params &params, const RemoteTable &remotes, BatchIssuer &issuer);
  ~Impl() override;

  void on_frame(const SideHeader &header, const SideEntry *table) override;
  void on_lost(const Failure &reason) override;

  Failure open();
  void describe(StagingBlob *blob) const;
  Failure connect(const StagingBlob &peer, const Deadline &deadline);
  void attach(UniqueFd socket);
  Failure admit(const RangePlan &plan) const;
  void enqueue(std::unique_ptr<StagedJob> job);
  void cancel(uint64_t tag);
  Failure check() const;
  bool progress(uint64_t until_ns);
  void batch_done(uint64_t token, const Failure &failure);
  void stop(const Failure &reason);
  void release();

  const SessionId &session() const { return session_; }
  const SessionKey &key() const { return params_.session_key; }
  bool awaits_connection() const { return connection_ == nullptr && !stopped_; }
  uint32_t transfers() const { return transfers_.load(); }

 private:
  enum class Serve { kCommit, kFetch };
  // staging_serve.cc
  kvl_status serve(Serve what, const SideHeader &header, const SideEntry *table);
  // staging_steps.cc
  bool build(StagedJob &job, Step *step);
  bool begin_step(StagedJob &job);
  bool begin_steps(uint64_t until_ns);
  void take_inbox();
  void issue(Step &step);
  void ask(Step &step, SideType type);
  void after_vendor(Step &step);
  void end(uint64_t token, const Failure &failure);
  void settle();
  void drop_parts(Step &step);

  StagingArea::Impl &area_;
  const kvl_link_params params_;
  const RemoteTable &remotes_;
  BatchIssuer &issuer_;
  SessionId session_;
  uint32_t window_ = kNoPart;
  bool released_ = false;

  // The side connection. I/O lock.
  const UniqueFd attached_;  // readable once the peer has connected
  std::unique_ptr<SideConnection> connection_;
  uint64_t peer_window_ = 0, peer_window_bytes_ = 0;
  Parts slots_;

  // I/O lock.
  std::deque<std::unique_ptr<StagedJob>> jobs_;
  std::map<uint64_t, Step> steps_;  // by token
  uint64_t next_token_ = 1;
  bool stopped_ = false;
  uint32_t busy_ = 0;  // inside a loop over jobs or steps: settle waits

  std::atomic<uint32_t> transfers_{0};
  std::atomic<bool> peer_serves_{false};
  mutable std::mutex inbox_mutex_;  // guards the rest
  std::vector<std::unique_ptr<StagedJob>> inbox_;
  std::vector<uint64_t> cancels_;
  Failure failure_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_STAGING_IMPL_H
