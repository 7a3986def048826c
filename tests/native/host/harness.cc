#include "harness.h"

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>

#if defined(__SANITIZE_THREAD__)
// The tests let transfers overlap on purpose, and then poll and a helper thread write the same user bytes: the
// application's race, which the provider neither has nor prevents. Everything but the copy itself is still checked.
extern "C" __attribute__((visibility("default"))) const char *__tsan_default_suppressions();
extern "C" const char *__tsan_default_suppressions() { return "race:kvlink::host::copy_pieces\n"; }
#endif

namespace kvlink::test {
namespace {

pid_t current_child = 0;
TestEngine *current_engine = nullptr;
bool killed_is_fine = false;
int pairs_run = 0;

// What goes to the peer and comes back from it orders this thread and its engine's poll, but through the other process,
// where the sanitizer cannot see it. Closing a handle that is not open takes the lock that poll holds, and does nothing
// else.
void order_with_poll() {
#if defined(__SANITIZE_THREAD__)
  kvl_error err = make_error();
  if (current_engine != nullptr) provider().mem_close(current_engine->get(), 0xfffff, &err);
#endif
}

}  // namespace

const kvl_provider &provider() {
  static const kvl_provider table = [] {
    kvl_provider filled{};
    filled.struct_size = sizeof filled;
    kvl_error err = make_error();
    CHECK_EQ(kvl_provider_init(KVL_ABI_VERSION, &filled, &err), KVL_OK);
    return filled;
  }();
  return table;
}

kvl_error make_error() {
  kvl_error err{};
  err.struct_size = sizeof err;
  return err;
}

bool have_cma() { return std::getenv("KVLINK_TEST_WITHOUT_CMA") == nullptr; }

std::vector<const char *> host_paths() {
  if (have_cma()) return {"shm", "cma", "tcp"};
  return {"shm", "tcp"};
}

void Pipe::send(const Bytes &message) {
  order_with_poll();
  const uint64_t length = message.size();
  CHECK_EQ(::send(fd_, &length, sizeof length, MSG_NOSIGNAL), static_cast<ssize_t>(sizeof length));
  if (length > 0) CHECK_EQ(::send(fd_, message.data(), length, MSG_NOSIGNAL), static_cast<ssize_t>(length));
}

Bytes Pipe::receive() {
  pollfd item{fd_, POLLIN, 0};
  CHECK_EQ(::poll(&item, 1, 60000), 1);
  uint64_t length = 0;
  CHECK_EQ(::recv(fd_, &length, sizeof length, MSG_WAITALL), static_cast<ssize_t>(sizeof length));
  Bytes message(length);
  if (length > 0) CHECK_EQ(::recv(fd_, message.data(), length, MSG_WAITALL), static_cast<ssize_t>(length));
  order_with_poll();
  return message;
}

pid_t child_pid() { return current_child; }
void expect_child_killed() { killed_is_fine = true; }

void run_pair(const char *name, const Side &parent, const Side &child) {
  std::printf("%s\n", name);
  std::fflush(stdout);
  int fds[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  killed_is_fine = false;
  current_child = fork();  // no thread of this process runs now
  CHECK(current_child >= 0);
  alarm(280);
  if (current_child == 0) {
    close(fds[0]);
    Pipe pipe(fds[1]);
    child(pipe);
    std::exit(0);  // and not _exit: the sanitizers report leaks at exit
  }
  close(fds[1]);
  Pipe pipe(fds[0]);
  parent(pipe);
  int status = 0;
  CHECK_EQ(waitpid(current_child, &status, 0), current_child);
  if (killed_is_fine) {
    CHECK(WIFSIGNALED(status));
  } else {
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
  }
  close(fds[0]);
  alarm(0);
  ++pairs_run;
}

int finish(const char *suite) {
  std::printf("%s: %d passed\n", suite, pairs_run);
  return 0;
}

TestEngine::TestEngine(const Options &options) {
  std::vector<kvl_option> list;
  for (const auto &option : options) list.push_back({option.first.c_str(), option.second.c_str()});
  kvl_engine_params params{};
  params.struct_size = sizeof params;
  params.options = list.data();
  params.option_count = static_cast<uint32_t>(list.size());
  params.device = "cpu";
  kvl_error err = make_error();
  if (provider().engine_open(&params, &engine_, &err) != KVL_OK) {
    std::fprintf(stderr, "engine_open: %s: %s\n", err.site, err.message);
    std::exit(1);
  }
  thread_ = std::thread([this] { run(); });
  current_engine = this;
}

TestEngine::~TestEngine() {
  current_engine = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    pause_ = false;
    changed_.notify_all();
  }
  provider().wake(engine_);
  thread_.join();
  provider().engine_close(engine_);
}

void TestEngine::run() {
  kvl_completion completions[16];
  for (;;) {
    uint32_t count = 16, more = 0;
    kvl_error err = make_error();
    CHECK_EQ(provider().poll(engine_, completions, &count, &more, &err), KVL_OK);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      for (uint32_t i = 0; i < count; ++i) CHECK(done_.emplace(completions[i].tag, completions[i]).second);
      if (count > 0) changed_.notify_all();
      if (stop_) return;
      while (pause_) {
        paused_ = true;
        changed_.notify_all();
        changed_.wait(lock);
      }
      paused_ = false;
    }
    if (more == 0 && count == 0) provider().wait(engine_, 1000);
  }
}

void TestEngine::pause() {
  std::unique_lock<std::mutex> lock(mutex_);
  pause_ = true;
  provider().wake(engine_);
  changed_.wait(lock, [this] { return paused_; });
}

void TestEngine::resume() {
  const std::lock_guard<std::mutex> lock(mutex_);
  pause_ = false;
  changed_.notify_all();
}

bool TestEngine::completed(uint64_t tag) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_.count(tag) != 0;
}

kvl_completion TestEngine::await(uint64_t tag, int timeout_ms) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool there =
      changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return done_.count(tag) != 0; });
  CHECK(there);
  const kvl_completion completion = done_[tag];
  return completion;  // kept: a second completion of the tag would fail the test
}

uint64_t TestEngine::statistic(const std::string &name) {
  kvl_stat stats[64];
  uint32_t count = 64;
  kvl_error err = make_error();
  CHECK_EQ(provider().stats(engine_, stats, &count, &err), KVL_OK);
  for (uint32_t i = 0; i < count; ++i) {
    if (name == stats[i].name) return stats[i].value;
  }
  std::fprintf(stderr, "no statistic %s\n", name.c_str());
  std::exit(1);
}

Bytes TestEngine::export_region(uint32_t mem) {
  kvl_error err = make_error();
  uint64_t length = 0;
  CHECK_EQ(provider().mem_export(engine_, mem, nullptr, &length, &err), KVL_NO_RESOURCE);
  Bytes blob(length);
  CHECK_EQ(provider().mem_export(engine_, mem, blob.data(), &length, &err), KVL_OK);
  return blob;
}

void TestEngine::open_region(uint32_t mem, void *address, uint64_t length, uint32_t access) {
  kvl_mem_desc desc{sizeof desc, KVL_MEMORY_HOST, -1, access, reinterpret_cast<uint64_t>(address), length};
  kvl_error err = make_error();
  CHECK_EQ(provider().mem_open(engine_, mem, &desc, &err), KVL_OK);
}

uint8_t *TestEngine::allocate(uint64_t length) {
  uint64_t address = 0;
  kvl_error err = make_error();
  if (provider().mem_alloc(engine_, KVL_MEMORY_HOST, length, &address, &err) != KVL_OK) {
    std::fprintf(stderr, "mem_alloc: %s: %s\n", err.site, err.message);
    std::exit(1);
  }
  return reinterpret_cast<uint8_t *>(address);
}

kvl_link_params link_params(uint32_t role, uint8_t session, uint8_t key) {
  kvl_link_params params{};
  params.struct_size = sizeof params;
  params.role = role;
  params.epoch = 1;
  std::memset(params.session, session, sizeof params.session);
  std::memset(params.session_key, key, sizeof params.session_key);
  return params;
}

kvl_link *open_link(TestEngine &engine, const kvl_link_params &params) {
  kvl_link *link = nullptr;
  kvl_error err = make_error();
  CHECK_EQ(provider().link_open(engine.get(), &params, &link, &err), KVL_OK);
  return link;
}

Bytes describe(kvl_link *link) {
  kvl_error err = make_error();
  uint64_t length = 0;
  CHECK_EQ(provider().link_describe(link, nullptr, &length, &err), KVL_NO_RESOURCE);
  Bytes blob(length);
  CHECK_EQ(provider().link_describe(link, blob.data(), &length, &err), KVL_OK);
  return blob;
}

kvl_link *connect_pair(TestEngine &engine, Pipe &pipe, bool initiator) {
  kvl_link *link = open_link(engine, link_params(initiator ? KVL_ROLE_INITIATOR : KVL_ROLE_ACCEPTOR));
  if (!initiator) {
    pipe.send(describe(link));
    pipe.await();
    return link;
  }
  const Bytes blob = pipe.receive();
  kvl_error err = make_error();
  if (provider().link_connect(link, blob.data(), blob.size(), 10000, &err) != KVL_OK) {
    std::fprintf(stderr, "link_connect: %s: %s\n", err.site, err.message);
    std::exit(1);
  }
  pipe.signal();
  return link;
}

kvl_status open_remote(kvl_link *link, uint32_t rmem, const Bytes &blob, kvl_error *err) {
  *err = make_error();
  return provider().rmem_open(link, rmem, blob.data(), blob.size(), 5000, err);
}

void exchange_region(TestEngine &engine, kvl_link *link, Pipe &pipe, uint32_t mem, uint32_t rmem) {
  pipe.send(engine.export_region(mem));
  const Bytes blob = pipe.receive();
  kvl_error err;
  if (open_remote(link, rmem, blob, &err) != KVL_OK) {
    std::fprintf(stderr, "rmem_open: %s: %s\n", err.site, err.message);
    std::exit(1);
  }
  pipe.signal();
  pipe.await();
}

uint64_t next_tag() {
  static std::atomic<uint64_t> tag{1};
  return tag++;
}

kvl_completion transfer(TestEngine &engine, kvl_link *link, uint32_t operation, const std::vector<kvl_range> &ranges) {
  kvl_completion done{};
  kvl_error err = make_error();
  const uint64_t tag = next_tag();
  const kvl_status status = provider().submit(link, operation, ranges.data(), ranges.size(), 0, tag, &done, &err);
  if (status == KVL_DONE) {
    CHECK_EQ(done.tag, tag);
    return done;
  }
  if (status != KVL_OK) {
    std::fprintf(stderr, "submit: %d: %s: %s\n", status, err.site, err.message);
    std::exit(1);
  }
  return engine.await(tag);
}

namespace {

uint64_t pattern_word(uint64_t seed, uint64_t word) {
  uint64_t value = (seed + 1) * 0x9e3779b97f4a7c15u + word * 0xbf58476d1ce4e5b9u;
  value ^= value >> 29;
  return value * 0x94d049bb133111ebu;
}

}  // namespace

uint8_t pattern(uint64_t seed, uint64_t position) {
  return static_cast<uint8_t>(pattern_word(seed, position / 8) >> (8 * (position % 8)));
}

void fill(uint8_t *data, uint64_t length, uint64_t seed) {
  for (uint64_t i = 0; i + 8 <= length; i += 8) {
    const uint64_t word = pattern_word(seed, i / 8);
    std::memcpy(data + i, &word, sizeof word);  // little-endian, as every machine this runs on
  }
  for (uint64_t i = length / 8 * 8; i < length; ++i) data[i] = pattern(seed, i);
}

int open_descriptors() {
  DIR *folder = opendir("/proc/self/fd");
  CHECK(folder != nullptr);
  int count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

}  // namespace kvlink::test
