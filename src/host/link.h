// One connection to one peer: its sockets, its remote regions, and the jobs that move bytes over it.
#ifndef KVLINK_HOST_LINK_H
#define KVLINK_HOST_LINK_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "auth.h"
#include "blob.h"
#include "engine.h"
#include "job.h"
#include "local_socket.h"
#include "remote.h"
#include "tcp_stream.h"

namespace kvlink::host {

class Link {
 public:
  Link(Engine &engine, const kvl_link_params &params);
  ~Link();
  Link(const Link &) = delete;
  Link &operator=(const Link &) = delete;

  // Any thread.
  Failure connect(const void *blob, uint64_t length, uint32_t timeout_ms);
  void interrupt();
  Failure check();
  void close(uint32_t grace_ms);
  Failure open_remote(uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms);
  void close_remote(uint32_t rmem) { remotes_.erase(rmem); }
  kvl_status submit(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag, kvl_completion *done,
                    kvl_error *err);
  void cancel(uint64_t tag);
  // Lends the caller's thread to the streams that owe an answer.
  void busy_poll(uint32_t budget_us);
  // Copies a claimed slice; failures land in the job.
  void run_slice(Job &job, Slice &slice);

  // I/O lock held from here on.
  // Would a connection with this hello be one that this acceptor still waits for?
  bool expects(const Hello &hello) const;
  Failure attach_stream(const Hello &hello, UniqueFd fd);
  Failure attach_local(UniqueFd fd, pid_t pid, bool cma_works);
  // The initiator's last word on the Unix socket.
  void on_verdict(bool tcp_needed);
  // Enters a job with TCP ranges; pump sends it.
  void start(Job *job);
  void pump();
  // Ends the job if nothing is left to do or to await.
  void settle(Job *job);
  void settle_stopped();
  void bring_down(const Failure &failure);
  // A job with TCP ranges left, rotated to the back of the queue; null when there is none.
  Job *next_tcp_job();
  // This side stops serving `mem` at once, if need be by ending the link.
  void revoke(uint32_t mem);
  void on_descriptor(uint64_t id, const Failure &failure, UniqueFd fd, uint64_t length, uint32_t access);

  Engine &engine() { return engine_; }
  const kvl_link_params &params() const { return params_; }
  RemoteTable &remotes() { return remotes_; }
  bool down() const { return down_.load(); }

 private:
  // A wait of open_remote for the peer's answer.
  struct DescriptorRequest {
    bool answered = false;
    Failure failure;
    UniqueFd fd;
    uint64_t length = 0;
    uint32_t access = 0;
  };
  struct Plan {  // what a scan of a submit's ranges found
    uint64_t bytes = 0;
    uint64_t pieces = 0;
    bool memory = false;
    bool tcp = false;
    Path slowest = Path::kShm;
  };

  Failure connect_paths(const LinkBlob &peer, const Deadline &deadline);
  Failure join_local(const LinkBlob &peer, const Deadline &deadline, UniqueFd socket, bool *tcp_needed);
  Failure handshake(int fd, Hello *hello, const Deadline &deadline, Ready *ready);
  Failure peer_failure();
  // A copy found the peer gone before its sockets said so: poll brings the link down.
  void note_lost(const Failure &failure);
  Failure wait_connected(const Deadline &deadline);
  void mark_connected();
  Failure pick_path(const RegionBlob &blob, Path *path) const;
  Failure fetch_shared(const RegionBlob &blob, const Deadline &deadline, RemoteRegion *region);
  Failure plan_submit(uint32_t operation, const kvl_range *ranges, uint64_t count, Plan *plan) const;
  void submit_inline(bool put, const kvl_range *ranges, uint64_t count, const Plan &plan, uint64_t tag,
                     kvl_completion *done);
  Failure move_pieces(Path path, bool put, iovec *local, iovec *remote, size_t count, CopyHint hint, uint64_t *moved);
  bool peer_lives() const;
  void drain(uint32_t grace_ms);

  Engine &engine_;
  const kvl_link_params params_;
  RemoteTable remotes_;
  std::mutex submit_mutex_;  // an inline submit; close waits for it

  std::mutex state_mutex_;  // guards the next block; held briefly
  std::condition_variable state_changed_;
  std::unordered_map<uint64_t, std::unique_ptr<Job>> jobs_;
  std::unordered_map<uint64_t, DescriptorRequest> requests_;
  uint64_t next_request_ = 1;
  bool connected_ = false;
  Failure failure_;
  UniqueFd interrupt_fd_;
  bool interrupted_ = false;
  std::atomic<bool> busy_polling_{false};
  std::atomic<bool> lost_{false}, down_{false};  // lost_: down_ follows at the next poll

  // Set before connected_ and constant afterwards.
  pid_t peer_pid_ = 0;
  UniqueFd peer_pidfd_;
  std::atomic<bool> cma_works_{false};
  std::atomic<bool> has_local_{false}, has_tcp_{false};

  // I/O lock.
  std::vector<std::unique_ptr<TcpStream>> streams_;
  uint32_t expected_streams_ = 0;
  size_t next_stream_ = 0;
  bool verdict_seen_ = false;
  std::unique_ptr<LocalSocket> local_;
  std::unique_ptr<ProcessWatch> process_;
  std::deque<Job *> tcp_jobs_;
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_LINK_H
