// One open engine: its listeners, one epoll set, its links, and the progress that poll drives.
#ifndef KVLINK_HOST_ENGINE_H
#define KVLINK_HOST_ENGINE_H

#include <sys/epoll.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "auth.h"
#include "job.h"
#include "memory.h"
#include "options.h"
#include "socket.h"
#include "tuner.h"
#include "workers.h"

namespace kvlink::host {

class Link;
class Listener;

// A descriptor in the epoll set and who handles its events. Everything here runs under the engine's I/O lock.
class Watch {
 public:
  virtual ~Watch() = default;
  virtual void on_events(uint32_t events) = 0;

  UniqueFd fd;
  bool dead = false;  // its events are ignored; it waits in the engine's graveyard until the current batch is over
};

struct Statistics {
  std::atomic<uint64_t> bytes[3]{};       // by path; moved by this side's submits
  std::atomic<uint64_t> served_bytes{0};  // by tcp, for peers
  std::atomic<uint64_t> inline_submits{0}, queued_submits{0}, direct_sends{0};
  std::atomic<uint64_t> frames_sent{0}, frames_received{0}, sendmsg_calls{0}, recvmsg_calls{0};
  std::atomic<uint64_t> process_vm_calls{0}, helper_slices{0};
  std::atomic<uint64_t> denied_accesses{0}, auth_failures{0}, protocol_errors{0}, links_lost{0};
};

using SessionId = std::array<uint8_t, 16>;

class Engine {
 public:
  static Failure open(const kvl_engine_params &params, std::unique_ptr<Engine> *engine);
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  // The I/O lock: sockets, links and jobs change only under it. poll makes way for whoever else wants it.
  class IoLock {
   public:
    explicit IoLock(Engine &engine);

   private:
    std::unique_lock<std::mutex> lock_;
  };

  void query(kvl_attr *attr) const;
  Failure close_region(uint32_t mem);
  void poll(kvl_completion *completions, uint32_t *count, uint32_t *more);
  void wait(uint32_t timeout_ms);
  void wake();
  // Wakes it in a few microseconds. A thread that is woken at once may take the core from the caller, who would return
  // only when the first part of the work is done.
  void wake_soon();
  void statistics(kvl_stat *out, uint32_t *count) const;

  // The next poll looks for jobs that were cancelled.
  void request_settling();
  // Submits: a new job for poll to pick up.
  void enqueue(Job *job);
  // The I/O lock if nobody holds or wants it.
  std::unique_lock<std::mutex> try_io();
  bool has_completions();
  // For a small TCP job: send now if nobody else does I/O. False when it is left to poll.
  bool try_progress(Link *link);

  // Below: I/O lock held.
  Failure watch(Watch *item, uint32_t events);
  void rewatch(Watch *item, uint32_t events);
  // Takes it out of the epoll set, closes its descriptor and destroys it once no event can name it.
  void bury(std::unique_ptr<Watch> item);
  void attach_new_jobs();
  void drop_memory_job(Job *job);
  void push_completion(const kvl_completion &completion);
  Failure add_link(Link *link);
  void remove_link(Link *link);
  Link *find_acceptor(const SessionId &session);

  const Options &options() const { return options_; }
  uint32_t thread_count() const { return thread_count_; }
  const std::string &boot_id() const { return boot_id_; }
  const std::string &local_name() const { return local_name_; }
  uint16_t port() const { return port_; }
  ProbeTarget probe_target() const;
  RegionTable &regions() { return regions_; }
  Statistics &stats() { return stats_; }
  Workers &workers() { return workers_; }
  CopyTuner &tuner() { return tuner_; }
  // One buffer for bytes that nobody wants (a refused PUT's payload).
  char *discard_buffer() { return discard_.data(); }
  size_t discard_size() const { return discard_.size(); }

 private:
  Engine();
  Failure start(const kvl_engine_params &params);
  void dispatch_events(uint64_t until_ns);
  int linger(epoll_event *events, int room);
  // Copies slices until `until_ns`; true when work is left that needs no event.
  bool run_memory_jobs(uint64_t until_ns);
  uint32_t take_completions(kvl_completion *completions, uint32_t room, bool *left);

  Options options_;
  uint32_t thread_count_ = 0;
  bool may_spin_ = false;
  std::string boot_id_, local_name_;
  uint16_t port_ = 0;
  std::unique_ptr<uint8_t[]> nonce_;  // what peers read to try process_vm_readv
  RegionTable regions_;
  Statistics stats_;
  Workers workers_;
  CopyTuner tuner_;

  UniqueFd epoll_, wake_fd_, timer_;
  std::mutex io_mutex_;
  std::atomic<uint32_t> io_waiters_{0};
  uint32_t yielded_ = 0;
  std::unique_ptr<Listener> tcp_listener_, local_listener_;
  std::vector<Link *> links_;
  std::map<SessionId, Link *> acceptors_;
  std::vector<std::unique_ptr<Watch>> graveyard_;
  std::deque<Job *> memory_jobs_;
  std::unique_ptr<Slice> slice_;
  std::vector<char> discard_;

  std::mutex new_jobs_mutex_;
  std::vector<Job *> new_jobs_;
  std::mutex completions_mutex_;
  std::deque<kvl_completion> completions_;
  std::atomic<bool> active_{false}, has_new_jobs_{false}, settling_{false};
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_ENGINE_H
