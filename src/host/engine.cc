#include "engine.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "blob.h"
#include "link.h"
#include "listener.h"

namespace kvlink::host {
namespace {

constexpr uint64_t kPollBudgetNs = 300 * 1000;
constexpr int kEventsPerPoll = 16;
constexpr uint64_t kHelperBytes = uint64_t{4} << 20;  // jobs from this size on are shared with the copy threads
constexpr uint32_t kMaxYields = 64;
constexpr uint64_t kLingerNs = 30 * 1000;
constexpr long kSoonNs = 30 * 1000;
constexpr size_t kDiscardBytes = 64 * 1024;

// Cores that this thread may run on.
uint32_t allowed_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  return static_cast<uint32_t>(CPU_COUNT(&allowed));
}

std::string random_name() {
  uint8_t bytes[16];
  if (!random_bytes(bytes, sizeof bytes)) return {};
  char text[48];
  int at = std::snprintf(text, sizeof text, "kvlink-");
  for (const uint8_t byte : bytes) at += std::snprintf(text + at, sizeof text - static_cast<size_t>(at), "%02x", byte);
  return text;
}

}  // namespace

Engine::Engine() : workers_(*this), slice_(std::make_unique<Slice>()), discard_(kDiscardBytes) {}

Engine::~Engine() {
  workers_.stop();
  for (Link *link : links_) delete link;  // the core closed them all; nothing may leak if it did not
}

Failure Engine::open(const kvl_engine_params &params, std::unique_ptr<Engine> *out) {
  std::unique_ptr<Engine> engine(new Engine());
  const Failure failure = engine->start(params);
  if (failure.ok()) *out = std::move(engine);
  return failure;
}

Failure Engine::start(const kvl_engine_params &params) {
  Failure failure = parse_options(params, &options_);
  if (!failure.ok()) return failure;
  const uint32_t cores = allowed_cores();
  thread_count_ = options_.threads > 0 ? options_.threads : std::min(cores, 4u) - 1;
  may_spin_ = cores > 1;
  nonce_ = std::make_unique<uint8_t[]>(sizeof ProbeTarget::value);
  if (!random_bytes(nonce_.get(), sizeof ProbeTarget::value)) {
    return errno_failure(KVL_UNAVAILABLE, errno, "getrandom", "no random bytes");
  }
  boot_id_ = read_boot_id();
  epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  wake_fd_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  timer_ = UniqueFd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!epoll_ || !wake_fd_ || !timer_)
    return errno_failure(KVL_NO_RESOURCE, errno, "epoll_create1", "no descriptors left");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;  // wake-ups: wait takes them
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_fd_.get(), &event) != 0 ||
      epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, timer_.get(), &event) != 0) {
    return errno_failure(KVL_NO_RESOURCE, errno, "epoll_ctl", "cannot watch the wake-up descriptor");
  }
  UniqueFd socket;
  failure = listen_tcp(options_.bind_host, options_.tcp_port, &socket, &port_);
  if (!failure.ok()) return failure;
  tcp_listener_ = std::make_unique<Listener>(*this, StreamKind::kTcp, std::move(socket));
  failure = watch(tcp_listener_.get(), EPOLLIN);
  if (!failure.ok() || options_.path == Path::kTcp) return failure;
  local_name_ = random_name();
  if (!listen_local(local_name_, &socket).ok()) {
    local_name_.clear();  // a sandbox without Unix sockets still has TCP
    return {};
  }
  local_listener_ = std::make_unique<Listener>(*this, StreamKind::kLocal, std::move(socket));
  return watch(local_listener_.get(), EPOLLIN);
}

Engine::IoLock::IoLock(Engine &engine) {
  engine.io_waiters_.fetch_add(1);
  lock_ = std::unique_lock<std::mutex>(engine.io_mutex_);
  engine.io_waiters_.fetch_sub(1);
}

void Engine::query(kvl_attr *attr) const {
  const uint32_t size = attr->struct_size;
  std::memset(attr, 0, sizeof *attr);
  attr->struct_size = size;
  attr->connect_mode = KVL_CONNECT_INITIATOR;
  attr->caps = KVL_CAP_PUT | KVL_CAP_GET | KVL_CAP_ACCEPTOR_SUBMIT | KVL_CAP_LATE_MEMORY | KVL_CAP_ALLOCATE |
               KVL_CAP_CANCEL | KVL_CAP_INTERRUPT | KVL_CAP_LINK_CHECK | KVL_CAP_STATISTICS | KVL_CAP_BUSY_POLL;
  attr->memory_kinds = 1u << KVL_MEMORY_HOST;
  attr->alignment = 1;
  attr->memory_alignment = 1;
  attr->max_describe = sizeof(LinkBlob);
  attr->max_export = sizeof(RegionBlob);
}

ProbeTarget Engine::probe_target() const {
  ProbeTarget target{};
  target.address = reinterpret_cast<uint64_t>(nonce_.get());
  std::memcpy(target.value, nonce_.get(), sizeof target.value);
  return target;
}

Failure Engine::close_region(uint32_t mem) {
  const IoLock io(*this);
  const Failure failure = regions_.close(mem);
  if (!failure.ok()) return failure;
  for (Link *link : links_) link->revoke(mem);
  const std::lock_guard<std::mutex> lock(completions_mutex_);
  if (!completions_.empty()) wake();
  return {};
}

void Engine::poll(kvl_completion *completions, uint32_t *count, uint32_t *more) {
  const uint32_t room = *count;
  bool left = false;
  *more = 0;
  if (io_waiters_.load() > 0 && yielded_ < kMaxYields) {
    // Locks are not fair: without this a busy poll would keep the others out.
    ++yielded_;
    sched_yield();
    *count = take_completions(completions, room, &left);
    *more = 1;
    return;
  }
  yielded_ = 0;
  bool work = false;
  {
    const std::lock_guard<std::mutex> io(io_mutex_);
    const uint64_t until_ns = now_ns() + kPollBudgetNs;
    attach_new_jobs();
    dispatch_events(until_ns);
    if (settling_.exchange(false)) {
      const std::vector<Link *> links = links_;
      for (Link *link : links) link->settle_stopped();
    }
    work = run_memory_jobs(until_ns);
    for (Listener *listener : {tcp_listener_.get(), local_listener_.get()}) {
      if (listener != nullptr) listener->expire();
    }
  }
  *count = take_completions(completions, room, &left);
  *more = work || left || has_new_jobs_.load() ? 1 : 0;
}

uint32_t Engine::take_completions(kvl_completion *completions, uint32_t room, bool *left) {
  const std::lock_guard<std::mutex> lock(completions_mutex_);
  uint32_t taken = 0;
  while (taken < room && !completions_.empty()) {
    completions[taken++] = completions_.front();
    completions_.pop_front();
  }
  *left = !completions_.empty();
  return taken;
}

void Engine::dispatch_events(uint64_t until_ns) {
  epoll_event events[kEventsPerPoll];
  const int ready = epoll_wait(epoll_.get(), events, kEventsPerPoll, 0);
  for (int i = 0; i < ready; ++i) {
    auto *item = static_cast<Watch *>(events[i].data.ptr);
    if (item == nullptr || item->dead) continue;
    item->on_events(events[i].events);
    active_.store(true, std::memory_order_relaxed);
    if (now_ns() >= until_ns) break;  // level-triggered: the others are reported again
  }
  graveyard_.clear();
}

bool Engine::run_memory_jobs(uint64_t until_ns) {
  bool work = false;
  size_t idle = 0;
  while (idle < memory_jobs_.size()) {
    Job *job = memory_jobs_.front();  // in turn, so that a small one does not wait for a large one
    memory_jobs_.pop_front();
    memory_jobs_.push_back(job);
    if (job->claim(regions_, job->link->remotes(), options_.copy_slice, slice_.get())) {
      job->link->run_slice(*job, *slice_);
      if (job->release()) job->link->settle(job);
      idle = 0;
      if (now_ns() >= until_ns) {
        work = !memory_jobs_.empty();
        break;
      }
    } else {
      const size_t before = memory_jobs_.size();
      job->link->settle(job);
      // Still there: a helper is in its last slice (and wakes this engine), or its TCP part goes on.
      if (memory_jobs_.size() == before) ++idle;
    }
  }
  return work;
}

// Where something just came, more soon follows: a peer that sends small transfers one by one. Being woken for it takes
// longer than all the rest of such a transfer, so the first moments are spent looking. Yields, so that nobody else
// waits for this core.
int Engine::linger(epoll_event *events, int room) {
  if (!active_.exchange(false, std::memory_order_relaxed) || !may_spin_) return 0;
  for (const uint64_t until_ns = now_ns() + kLingerNs; now_ns() < until_ns;) {
    const int ready = epoll_wait(epoll_.get(), events, room, 0);
    if (ready != 0) return std::max(ready, 0);
    sched_yield();
  }
  return 0;
}

void Engine::wait(uint32_t timeout_ms) {
  uint64_t sleep_ms = timeout_ms;
  for (const Listener *listener : {tcp_listener_.get(), local_listener_.get()}) {
    if (listener != nullptr) sleep_ms = std::min<uint64_t>(sleep_ms, listener->next_expiry_ms());
  }
  epoll_event events[8];
  int ready = linger(events, 8);
  if (ready == 0)
    ready = epoll_wait(epoll_.get(), events, 8, static_cast<int>(std::min<uint64_t>(sleep_ms, INT32_MAX)));
  for (int i = 0; i < ready; ++i) {
    uint64_t value;
    if (events[i].data.ptr != nullptr) continue;
    for (const int fd : {wake_fd_.get(), timer_.get()}) static_cast<void>(read(fd, &value, sizeof value) < 0);
  }
}

void Engine::wake() {
  const uint64_t one = 1;
  static_cast<void>(write(wake_fd_.get(), &one, sizeof one) < 0);  // full means that it is awake already
}

void Engine::wake_soon() {
  itimerspec at{};
  at.it_value.tv_nsec = kSoonNs;
  if (timerfd_settime(timer_.get(), 0, &at, nullptr) != 0) wake();
}

void Engine::request_settling() {
  settling_.store(true);
  wake();
}

void Engine::enqueue(Job *job) {
  const std::lock_guard<std::mutex> lock(new_jobs_mutex_);
  new_jobs_.push_back(job);
  has_new_jobs_.store(true);
}

std::unique_lock<std::mutex> Engine::try_io() {
  if (io_waiters_.load() > 0) return {};
  return std::unique_lock<std::mutex>(io_mutex_, std::try_to_lock);
}

bool Engine::has_completions() {
  const std::lock_guard<std::mutex> lock(completions_mutex_);
  return !completions_.empty();
}

bool Engine::try_progress(Link *link) {
  const std::unique_lock<std::mutex> io(io_mutex_, std::try_to_lock);
  if (!io.owns_lock()) return false;
  attach_new_jobs();
  stats_.direct_sends.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard<std::mutex> lock(completions_mutex_);
  return !link->down() && completions_.empty();  // else poll has something to give out, and must be woken
}

void Engine::attach_new_jobs() {
  if (!has_new_jobs_.load()) return;
  std::vector<Job *> jobs;
  {
    const std::lock_guard<std::mutex> lock(new_jobs_mutex_);
    jobs.swap(new_jobs_);
    has_new_jobs_.store(false);
  }
  // All jobs are entered before anything is sent: a link that breaks while sending ends jobs of this batch.
  std::vector<Link *> links;
  for (Job *job : jobs) {
    job->attached = true;
    if (job->stopped()) settling_.store(true);
    if (job->uses_memory) {
      memory_jobs_.push_back(job);
      if (job->bytes >= kHelperBytes) workers_.offer(job);
    }
    if (job->uses_tcp) {
      job->link->start(job);
      if (std::find(links.begin(), links.end(), job->link) == links.end()) links.push_back(job->link);
    }
  }
  for (Link *link : links) link->pump();
}

void Engine::drop_memory_job(Job *job) {
  memory_jobs_.erase(std::remove(memory_jobs_.begin(), memory_jobs_.end(), job), memory_jobs_.end());
}

void Engine::push_completion(const kvl_completion &completion) {
  const std::lock_guard<std::mutex> lock(completions_mutex_);
  completions_.push_back(completion);
}

Failure Engine::watch(Watch *item, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = item;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, item->fd.get(), &event) == 0) return {};
  return errno_failure(KVL_NO_RESOURCE, errno, "epoll_ctl", "cannot watch a data connection");
}

void Engine::rewatch(Watch *item, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = item;
  static_cast<void>(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, item->fd.get(), &event));
}

void Engine::bury(std::unique_ptr<Watch> item) {
  if (item->fd) static_cast<void>(epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, item->fd.get(), nullptr));
  item->fd.reset();
  item->dead = true;
  graveyard_.push_back(std::move(item));
}

Failure Engine::add_link(Link *link) {
  if (link->params().role == KVL_ROLE_ACCEPTOR) {
    SessionId session;
    std::memcpy(session.data(), link->params().session, session.size());
    if (!acceptors_.emplace(session, link).second) {
      return make_failure(KVL_INVALID, "link_open", "a link with this session is open already");
    }
  }
  links_.push_back(link);
  return {};
}

void Engine::remove_link(Link *link) {
  links_.erase(std::remove(links_.begin(), links_.end(), link), links_.end());
  for (auto item = acceptors_.begin(); item != acceptors_.end();) {
    item = item->second == link ? acceptors_.erase(item) : std::next(item);
  }
}

Link *Engine::find_acceptor(const SessionId &session) {
  const auto found = acceptors_.find(session);
  return found == acceptors_.end() ? nullptr : found->second;
}

void Engine::statistics(kvl_stat *out, uint32_t *count) const {
  const struct {
    const char *name;
    const std::atomic<uint64_t> &value;
  } items[] = {{"shm_bytes", stats_.bytes[0]},
               {"cma_bytes", stats_.bytes[1]},
               {"tcp_bytes", stats_.bytes[2]},
               {"tcp_served_bytes", stats_.served_bytes},
               {"inline_submits", stats_.inline_submits},
               {"queued_submits", stats_.queued_submits},
               {"direct_sends", stats_.direct_sends},
               {"frames_sent", stats_.frames_sent},
               {"frames_received", stats_.frames_received},
               {"sendmsg_calls", stats_.sendmsg_calls},
               {"recvmsg_calls", stats_.recvmsg_calls},
               {"process_vm_calls", stats_.process_vm_calls},
               {"helper_slices", stats_.helper_slices},
               {"denied_accesses", stats_.denied_accesses},
               {"auth_failures", stats_.auth_failures},
               {"protocol_errors", stats_.protocol_errors},
               {"links_lost", stats_.links_lost}};
  const uint32_t room = *count;
  *count = static_cast<uint32_t>(sizeof items / sizeof items[0]);
  if (out == nullptr) return;
  *count = std::min(room, *count);
  for (uint32_t i = 0; i < *count; ++i) {
    std::snprintf(out[i].name, sizeof out[i].name, "%s", items[i].name);
    out[i].value = items[i].value.load(std::memory_order_relaxed);
  }
}

}  // namespace kvlink::host
