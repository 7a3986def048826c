// One link: this side's connection to the peer's engine (the peer makes the one back), and the transfers over it.
#ifndef KVLINK_HIXL_LINK_H
#define KVLINK_HIXL_LINK_H

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "link_blob.h"

namespace kvlink::hixl_provider {

// One accepted submit. It ends when nothing of it is with the vendor any more.
struct Job {
  uint64_t tag = 0;
  uint32_t operation = 0;
  ascend::RangeCursor cursor;
  uint64_t bytes = 0;
  uint32_t outstanding = 0;            // requests with the vendor
  ascend::aclrtEvent event = nullptr;  // on the caller's stream: the transfer begins when it is complete
  bool stopped = false;                // nothing more of it is started
  Failure failure;
  std::list<Job>::iterator place;
};

class Link final : public ascend::BatchIssuer {
 public:
  explicit Link(Engine &engine);
  ~Link() override;
  Link(const Link &) = delete;
  Link &operator=(const Link &) = delete;
  Failure open(const kvl_link_params &params);

  Failure describe(void *buffer, uint64_t *length);
  Failure connect(const void *blob, uint64_t length, uint32_t timeout_ms);
  void interrupt();
  // Ends every transfer, then this side's connection. See provider.h: works with a dead or stopped peer.
  void close(uint32_t grace_ms);

  Failure open_remote(uint32_t rmem, const void *blob, uint64_t length);
  void close_remote(uint32_t rmem) { remotes_.erase(rmem); }

  kvl_status submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream, uint64_t tag,
                    kvl_error *err);
  void cancel(uint64_t tag);

  // The engine's thread, I/O lock held. True when work is left that needs no event.
  bool progress(uint64_t until_ns);
  bool in_flight() const { return !jobs_.empty() || !requests_.empty() || !staged_.empty(); }

  // For the staging area: a batch of its own.
  Failure issue(uint32_t operation, const ascend::Descriptor *descriptors, uint64_t count, uint64_t token) override;
  uint64_t max_batch() const override { return kBatch; }

 private:
  struct Request {
    void *id;
    Job *job;        // null: a batch of the staging area
    uint64_t token;  // which one
  };
  // A batch of the staging area that waits for its turn.
  struct Staged {
    uint32_t operation;
    uint64_t token;
    std::vector<ascend::Descriptor> descriptors;
  };
  // The vendor's side of the connection, which calls that were given up keep alive.
  struct Session;

  void introduce();  // what describe says, once and for all

  // connect.cc
  Failure connect_once(uint32_t timeout_ms, const host::Deadline &deadline, bool *again);
  host::Deadline turn(const host::Deadline &deadline) const;
  Failure with_health(Failure failure) const;
  void disconnect(uint32_t grace_ms);
  Failure disconnect_once(const host::Deadline &deadline);

  // progress.cc
  enum class Started { kYes, kNoRoom, kNo };
  void take_new();
  void ask_requests(uint64_t until_ns);
  void ask_events();
  bool start_staged(uint64_t until_ns);
  void end_staged(const Failure &failure);
  bool start_jobs(uint64_t until_ns);
  Started start_batch(Job &job);
  Failure transfer(uint32_t operation, Job *job, uint64_t token, uint32_t count, bool *out_of_streams);
  void end_request(const Request &request, const Failure &failure);
  void fail(Job &job, Failure failure);
  void finish_if_done(Job &job);
  void lose(const Failure &failure);
  void stop_waiting(const Failure &failure);
  void unlist(const Job &job);
  void drop_event(Job &job);
  Request take_request(size_t index);
  uint32_t settle();

  Engine &engine_;
  const std::shared_ptr<HixlEngine> hixl_;
  host::UniqueFd interrupt_;
  LinkBlob self_{}, peer_{};
  std::mutex describe_mutex_;
  bool described_ = false;
  ascend::Bindings bindings_;
  std::shared_ptr<Session> session_;
  ascend::LinkType type_ = ascend::LinkType::kRoce;
  ascend::RemoteTable remotes_;
  std::unique_ptr<ascend::StagingLink> staging_;

  bool vendor_connected_ = false;  // Connect said so; the connecting and the closing thread's
  std::atomic<bool> connected_{false};
  std::atomic<bool> down_{false};
  Failure down_reason_;                // I/O lock; set once, before down_
  std::atomic<uint64_t> accepted_{0};  // jobs not complete

  std::mutex inbox_mutex_;  // held for a few instructions
  std::list<Job> inbox_;
  std::vector<uint64_t> cancels_;
  std::atomic<bool> has_inbox_{false};

  // I/O lock:
  std::list<Job> jobs_;
  std::deque<Job *> ready_;      // to be started, in order
  std::vector<Job *> deferred_;  // waiting for their event
  std::deque<Staged> staged_;
  std::vector<Request> requests_;
  bool starved_ = false;  // the vendor has no stream: ask again later
  bool closing_ = false;
};

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_LINK_H
