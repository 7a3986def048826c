// One connection to one peer: its communicator, the peer's regions, and the transfers on their way.
//
// submit validates and queues. Everything that touches a stream happens in progress, which poll runs under the engine's
// I/O lock. A stream that failed, or that must be stopped, is destroyed on a thread of its own, for that may block; its
// transfer completes when it is gone, so that a completion always means that nothing moves any more.
#ifndef KVLINK_HCOMM_LINK_H
#define KVLINK_HCOMM_LINK_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ascend/staging.h"
#include "connection.h"
#include "engine.h"

namespace kvlink::hcomm {

// One accepted submit, or a batch of the staging area.
struct Job {
  uint64_t tag = 0;
  bool put = false;
  bool staged = false;  // a batch of the staging area, all of it issued; `tag` is its token
  uint64_t bytes = 0;
  ascend::RangeCursor cursor;
  ascend::aclrtEvent after = nullptr;  // on the caller's stream: nothing moves before it
  std::atomic<bool> cancelled{false};
  Failure failure;  // why not all of it was issued
};

class Link : public ascend::BatchIssuer, public std::enable_shared_from_this<Link> {
 public:
  static Failure open(const std::shared_ptr<Engine> &engine, const kvl_link_params &params, std::shared_ptr<Link> *out);
  ~Link() override;

  // Any thread.
  Failure describe(void *buffer, uint64_t *length);
  void describe_self();
  Failure connect(const void *blob, uint64_t length, uint32_t timeout_ms);
  void interrupt();
  void close(uint32_t grace_ms);
  Failure open_remote(uint32_t rmem, const void *blob, uint64_t length);
  void close_remote(uint32_t rmem) { remotes_.erase(rmem); }
  kvl_status submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream, uint64_t tag,
                    kvl_completion *done, kvl_error *err);
  void cancel(uint64_t tag);

  // I/O lock held, engine's thread, the device's context current.
  // Moves on until `until_ns`; true when work is left that needs no event.
  bool progress(uint64_t until_ns);
  uint32_t staged_transfers() const { return staging_->transfers(); }
  // For the staging area.
  Failure issue(uint32_t operation, const ascend::Descriptor *descriptors, uint64_t count, uint64_t token) override;
  uint64_t max_batch() const override { return engine_->max_batch(); }

 private:
  struct Flight {
    ascend::Lane lane;
    std::shared_ptr<Job> job;
    bool issued = false;    // something is on the stream
    bool recorded = false;  // all of it is, and its end is marked
    uint64_t look_ns = 0;   // when to ask the stream itself, should its event never complete
  };
  enum class Step { kBusy, kWaiting, kDone };

  Link(std::shared_ptr<Engine> engine, const kvl_link_params &params);
  Failure check_submit(uint32_t operation, const kvl_range *ranges, uint64_t count, ascend::RangePlan *plan) const;
  void take_down(uint64_t start_ns, uint32_t grace_ms);
  Failure run_connect(const Topology &topology, const host::Deadline &deadline);

  // flight.cc; I/O lock held, engine's thread.
  bool start_jobs(uint64_t until_ns);
  Step advance(Flight &flight, uint64_t until_ns);
  Step issue_rest(Flight &flight, uint64_t until_ns);
  Step look(Flight &flight);
  Failure issue_batch(Flight &flight);
  Failure call_batch(Flight &flight, ascend::HcclOneSideOpDesc *batch, uint32_t count);
  uint32_t next_batch(Job &job, ascend::HcclOneSideOpDesc *batch);
  // The stream has failed: it is destroyed elsewhere, then the job ends.
  void stop_flight(Flight flight, const Failure &failure);
  void finish(Job &job, const Failure &failure);
  // The link is down: nothing more is issued, what waits fails.
  void lose(const Failure &failure);
  Failure reason();
  std::shared_ptr<Job> take_job();
  void fail_queued(const Failure &failure);
  bool idle() const { return flights_.empty() && incoming_.empty() && stopping_ == 0; }

  const std::shared_ptr<Engine> engine_;
  const kvl_link_params params_;
  ascend::RemoteTable remotes_;
  host::UniqueFd interrupt_fd_;

  std::mutex describe_mutex_;
  bool described_ = false;
  // Set by describe and connect, constant while transfers run.
  LinkBlob self_{};
  LinkBlob peer_{};
  ascend::LinkType type_ = ascend::LinkType::kRoce;
  std::shared_ptr<Connection> connection_;
  std::unique_ptr<ascend::StagingLink> staging_;

  std::atomic<bool> halted_{false};  // nothing is issued any more
  std::mutex queue_mutex_;           // guards the next block; held briefly
  bool up_ = false;
  Failure failure_;  // why it is down
  std::deque<std::shared_ptr<Job>> queue_;
  std::unordered_map<uint64_t, Job *> live_;  // accepted and not complete, by tag

  // I/O lock.
  std::vector<Flight> flights_;
  std::vector<Flight> incoming_;  // the staging area's, issued while flights_ may not change
  uint32_t staged_flights_ = 0;
  uint32_t stopping_ = 0;  // flights whose stream is being destroyed
  std::condition_variable idle_changed_;
};

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_LINK_H
