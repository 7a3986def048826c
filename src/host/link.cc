// The life of a link once its sockets are there: attach, jobs, loss, close, and importing the peer's regions.
#include "link.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstring>
#include <thread>

namespace kvlink::host {
namespace {

std::chrono::milliseconds remaining(const Deadline &deadline) {
  return std::chrono::milliseconds(deadline.remaining_ms());
}

}  // namespace

Link::Link(Engine &engine, const kvl_link_params &params) : engine_(engine), params_(params) {}

Link::~Link() = default;

Failure Link::peer_failure() {
  const std::lock_guard<std::mutex> lock(state_mutex_);
  if (!failure_.ok()) return failure_;
  return make_failure(KVL_LINK_DOWN, "link", "the link is closed");
}

void Link::note_lost(const Failure &failure) {
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    if (lost_.load() || down_.load()) return;
    failure_ = failure;
    lost_.store(true);
  }
  engine_.request_settling();
}

bool Link::expects(const Hello &hello) const {
  if (down_.load() || params_.role != KVL_ROLE_ACCEPTOR) return false;
  if (hello.kind == static_cast<uint32_t>(StreamKind::kLocal)) {
    return local_ == nullptr && streams_.empty() && hello.index == 0 && hello.stream_count == 0;
  }
  if (hello.stream_count == 0 || hello.stream_count > 64 || hello.index >= hello.stream_count) return false;
  if (!streams_.empty() && hello.stream_count != expected_streams_) return false;
  return std::none_of(streams_.begin(), streams_.end(),
                      [&](const auto &stream) { return stream->index() == hello.index; });
}

Failure Link::attach_stream(const Hello &hello, UniqueFd fd) {
  tune_tcp(fd.get(), engine_.options().peer_timeout_ms);
  auto stream = std::make_unique<TcpStream>(*this, std::move(fd), hello.index);
  const Failure failure = engine_.watch(stream.get(), EPOLLIN);
  if (!failure.ok()) return failure;
  expected_streams_ = hello.stream_count;
  streams_.push_back(std::move(stream));
  if (streams_.size() == expected_streams_) {
    has_tcp_.store(true);
    if (params_.role == KVL_ROLE_ACCEPTOR && (local_ == nullptr || verdict_seen_)) mark_connected();
  }
  return {};
}

Failure Link::attach_local(UniqueFd fd, pid_t pid, bool cma_works) {
  auto local = std::make_unique<LocalSocket>(*this, std::move(fd));
  Failure failure = engine_.watch(local.get(), EPOLLIN);
  if (!failure.ok()) return failure;
  local_ = std::move(local);
  peer_pid_ = pid;
  peer_pidfd_.reset(open_pidfd(pid));
  if (peer_pidfd_) {
    auto process = std::make_unique<ProcessWatch>(*this, dup(peer_pidfd_.get()));
    // Best effort: without it the end of file on the socket still says that the peer is gone.
    if (process->fd && engine_.watch(process.get(), EPOLLIN).ok()) process_ = std::move(process);
  }
  cma_works_.store(cma_works);
  has_local_.store(true);
  return {};
}

void Link::on_verdict(bool tcp_needed) {
  verdict_seen_ = true;
  if (!tcp_needed || has_tcp_.load()) mark_connected();
}

void Link::mark_connected() {
  const std::lock_guard<std::mutex> lock(state_mutex_);
  connected_ = true;
  state_changed_.notify_all();
}

Failure Link::wait_connected(const Deadline &deadline) {
  std::unique_lock<std::mutex> lock(state_mutex_);
  state_changed_.wait_for(lock, remaining(deadline), [this] { return connected_ || down_.load(); });
  if (down_.load()) return failure_;
  if (!connected_) return make_failure(KVL_STATE, "rmem_open", "the link is not connected");
  return {};
}

Failure Link::check() {
  if (down_.load() || lost_.load()) return peer_failure();
  if (!peer_lives()) return make_failure(KVL_LINK_DOWN, "pidfd", "the peer's process %d ended", peer_pid_);
  return {};
}

bool Link::peer_lives() const {
  if (down_.load()) return false;
  if (!has_local_.load() || !peer_pidfd_) return true;
  pollfd item{peer_pidfd_.get(), POLLIN, 0};
  return ::poll(&item, 1, 0) == 0;
}

Failure Link::pick_path(const RegionBlob &blob, Path *path) const {
  const Path forced = engine_.options().path;
  const bool shm = blob.shared == 1 && has_local_.load();
  const bool cma = has_local_.load() && cma_works_.load();
  const bool usable[] = {shm, cma, has_tcp_.load()};
  for (uint32_t i = 0; i < 3; ++i) {
    const auto candidate = static_cast<Path>(i);
    if ((forced == Path::kAuto || forced == candidate) && usable[i]) {
      *path = candidate;
      return {};
    }
  }
  if (forced == Path::kShm && blob.shared == 0) {
    return make_failure(KVL_UNSUPPORTED, "rmem_open",
                        "option path=shm, but the peer's region was not made by allocate()");
  }
  if (forced == Path::kCma && has_local_.load()) {
    return make_failure(KVL_DENIED, "process_vm_readv",
                        "option path=cma, but reading process %d is forbidden; check user, Yama's ptrace_scope and PID "
                        "namespaces",
                        peer_pid_);
  }
  return make_failure(KVL_UNSUPPORTED, "rmem_open", "option path=%s, but the peer cannot be reached that way",
                      forced == Path::kAuto ? "auto" : kPathNames[static_cast<uint32_t>(forced)]);
}

Failure Link::open_remote(uint32_t rmem, const void *data, uint64_t length, uint32_t timeout_ms) {
  RegionBlob blob{};
  Failure failure = parse_region_blob(data, length, &blob);
  if (!failure.ok()) return failure;
  const Deadline deadline{now_ns() + uint64_t{timeout_ms} * 1000000, -1};
  failure = wait_connected(deadline);
  if (!failure.ok()) return failure;
  auto region = std::make_unique<RemoteRegion>();
  region->rmem = rmem;
  region->mem = blob.mem;
  region->access = blob.access;
  region->length = blob.length;
  failure = pick_path(blob, &region->path);
  if (!failure.ok()) return failure;
  if (region->path == Path::kCma) region->base = reinterpret_cast<char *>(blob.address);
  if (region->path == Path::kShm) {
    failure = fetch_shared(blob, deadline, region.get());
    if (!failure.ok()) return failure;
  }
  return remotes_.insert(std::move(region));
}

// Asks the exporter for the descriptor; its engine answers from poll.
Failure Link::fetch_shared(const RegionBlob &blob, const Deadline &deadline, RemoteRegion *region) {
  LocalMessage message{};
  message.magic = LocalMessage::kMagic;
  message.type = static_cast<uint32_t>(LocalMessageType::kDescriptorRequest);
  message.mem = blob.mem;
  {
    const Engine::IoLock io(engine_);
    if (local_ == nullptr) return peer_failure();
    {
      const std::lock_guard<std::mutex> lock(state_mutex_);
      message.id = next_request_++;
      requests_[message.id];
    }
    const Failure sent = local_->send(message);
    if (!sent.ok()) {
      const std::lock_guard<std::mutex> lock(state_mutex_);
      requests_.erase(message.id);
      return sent;
    }
  }
  std::unique_lock<std::mutex> lock(state_mutex_);
  state_changed_.wait_for(lock, remaining(deadline), [&] { return requests_[message.id].answered || down_.load(); });
  DescriptorRequest request = std::move(requests_[message.id]);
  requests_.erase(message.id);
  if (!request.answered) {
    if (down_.load()) return failure_;
    return make_failure(KVL_TIMEOUT, "rmem_open", "the peer did not pass its shared memory in time");
  }
  lock.unlock();
  if (!request.failure.ok()) return request.failure;
  if (request.length != blob.length || request.access != blob.access) {
    return make_failure(KVL_REMOTE, "rmem_open",
                        "the peer's region changed: %" PRIu64 " bytes, access %u; published as %" PRIu64 ", %u",
                        request.length, request.access, blob.length, blob.access);
  }
  return map_shared(request.fd.get(), blob.length, (blob.access & KVL_ACCESS_WRITE) != 0, deadline, &region->base);
}

void Link::on_descriptor(uint64_t id, const Failure &failure, UniqueFd fd, uint64_t length, uint32_t access) {
  const std::lock_guard<std::mutex> lock(state_mutex_);
  const auto found = requests_.find(id);
  if (found == requests_.end()) return;  // its asker gave up
  found->second = DescriptorRequest{true, failure, std::move(fd), length, access};
  state_changed_.notify_all();
}

void Link::start(Job *job) {
  tcp_jobs_.push_back(job);
  job->queued_tcp = true;
}

void Link::pump() {
  for (size_t i = 0; i < streams_.size() && !tcp_jobs_.empty(); ++i) {
    TcpStream &stream = *streams_[next_stream_++ % streams_.size()];
    if (!stream.wants_write()) stream.send_some();
  }
}

void Link::busy_poll(uint32_t budget_us) {
  if (busy_polling_.exchange(true)) return;
  const uint64_t until_ns = now_ns() + uint64_t{budget_us} * 1000;
  bool lent = false;
  do {
    std::unique_lock<std::mutex> io = engine_.try_io();
    if (!io || down_.load()) break;
    bool awaited = false;
    for (size_t i = 0; i < streams_.size(); ++i) {  // one that breaks takes all of them with it
      TcpStream &stream = *streams_[i];
      if (!stream.awaits_answer()) continue;
      awaited = lent = true;
      stream.lend(true);
      stream.on_events(EPOLLIN);
    }
    if (!awaited || engine_.has_completions()) break;
    io.unlock();
    sched_yield();  // the peer may need this very core
  } while (now_ns() < until_ns);
  if (lent) {
    const Engine::IoLock io(engine_);
    for (const auto &stream : streams_) stream->lend(false);  // level-triggered: what has come since wakes the engine
  }
  busy_polling_.store(false);
}

Job *Link::next_tcp_job() {
  while (!tcp_jobs_.empty()) {
    Job *job = tcp_jobs_.front();
    tcp_jobs_.pop_front();
    if (!job->tcp_end && !job->stopped()) {
      tcp_jobs_.push_back(job);
      return job;
    }
    job->queued_tcp = false;
    settle(job);
  }
  return nullptr;
}

void Link::settle(Job *job) {
  if (!job->finished()) return;
  if (job->uses_memory) {
    // A helper may have begun to look for a slice since the check; after this none can, and a second check is final.
    engine_.workers().withdraw(job);
    if (!job->finished()) return;
  }
  if (job->queued_tcp) tcp_jobs_.erase(std::find(tcp_jobs_.begin(), tcp_jobs_.end(), job));
  if (job->uses_memory) engine_.drop_memory_job(job);
  kvl_completion completion{};
  completion.tag = job->tag;
  completion.path = static_cast<uint32_t>(job->slowest);
  completion.bytes = job->moved.load();
  {
    const std::lock_guard<std::mutex> lock(job->mutex);
    if (!job->failure.ok()) {
      report(job->failure, &completion);
    } else if (job->cancelled.load() && completion.bytes < job->bytes) {
      report(make_failure(KVL_CANCELLED, "cancel", "cancelled after %" PRIu64 " of %" PRIu64 " bytes", completion.bytes,
                          job->bytes),
             &completion);
    }
  }
  engine_.push_completion(completion);
  std::unique_ptr<Job> gone;
  const std::lock_guard<std::mutex> lock(state_mutex_);
  const auto found = jobs_.find(job->tag);
  gone = std::move(found->second);
  jobs_.erase(found);
}

void Link::settle_stopped() {
  if (lost_.load() && !down_.load()) bring_down(peer_failure());
  std::vector<Job *> stopped;
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    for (const auto &item : jobs_) {
      // One that was cancelled before poll took it over is still in the engine's queue, which would be left with a
      // pointer to nothing; attach_new_jobs asks for another round.
      if (item.second->attached && item.second->stopped()) stopped.push_back(item.second.get());
    }
  }
  for (Job *job : stopped) settle(job);
}

void Link::cancel(uint64_t tag) {
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    const auto found = jobs_.find(tag);
    if (found == jobs_.end()) return;
    found->second->cancelled.store(true);
  }
  engine_.request_settling();
}

void Link::bring_down(const Failure &failure) {
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    if (down_.load()) return;
    failure_ = failure;
    failure_.status = KVL_LINK_DOWN;
    down_.store(true);
    state_changed_.notify_all();
  }
  engine_.stats().links_lost.fetch_add(1, std::memory_order_relaxed);
  for (auto &stream : streams_) engine_.bury(std::move(stream));
  streams_.clear();
  if (local_ != nullptr) engine_.bury(std::move(local_));
  if (process_ != nullptr) engine_.bury(std::move(process_));
  // Jobs that poll has not seen yet must not be started later. The queue's other links are started here as well.
  engine_.attach_new_jobs();
  for (Job *job : tcp_jobs_) job->queued_tcp = false;
  tcp_jobs_.clear();
  std::vector<Job *> jobs;
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    for (const auto &item : jobs_) jobs.push_back(item.second.get());
  }
  for (Job *job : jobs) {
    job->fail(failure_);
    job->outstanding = 0;
    settle(job);  // or later, when a copy thread has let go of it
  }
}

void Link::revoke(uint32_t mem) {
  for (const auto &stream : streams_) {
    if (stream->serves(mem)) {
      bring_down(make_failure(KVL_LINK_DOWN, "mem_close", "a region was closed while the peer was in it"));
      return;
    }
  }
}

// Unsent work is dropped; what is on the wire gets `grace_ms` to be answered. Drives its own sockets, since the caller
// may be the thread that polls.
void Link::drain(uint32_t grace_ms) {
  const Deadline deadline{now_ns() + uint64_t{grace_ms} * 1000000, -1};
  for (;;) {
    std::vector<pollfd> fds;
    {
      const Engine::IoLock io(engine_);
      engine_.attach_new_jobs();
      settle_stopped();
      for (size_t i = 0; i < streams_.size(); ++i) streams_[i]->on_events(EPOLLIN);
      bool idle = true;
      {
        const std::lock_guard<std::mutex> lock(state_mutex_);
        idle = jobs_.empty();
      }
      if (idle || down_.load()) return;
      for (const auto &stream : streams_) {
        fds.push_back({stream->fd.get(), static_cast<short>(POLLIN | (stream->wants_write() ? POLLOUT : 0)), 0});
      }
    }
    const int left = deadline.remaining_ms();
    if (left == 0) return;
    // Short rounds: poll, on another thread, may read the very event that this one waits for.
    static_cast<void>(::poll(fds.data(), fds.size(), std::min(left, 2)));
  }
}

void Link::close(uint32_t grace_ms) {
  interrupt();
  {
    const std::lock_guard<std::mutex> inline_submit(submit_mutex_);  // one that runs has ended after this
  }
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    for (const auto &item : jobs_) item.second->cancelled.store(true);
  }
  drain(grace_ms);
  const auto idle = [this] {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    return jobs_.empty();
  };
  {
    const Engine::IoLock io(engine_);
    engine_.remove_link(this);
    bring_down(make_failure(KVL_LINK_DOWN, "link_close", "the link was closed with the transfer in flight"));
    settle_stopped();
  }
  // Helpers end their slice (well under a millisecond) and let go.
  while (!idle()) {
    std::this_thread::yield();
    const Engine::IoLock io(engine_);
    settle_stopped();
  }
  engine_.wake();
}

}  // namespace kvlink::host
