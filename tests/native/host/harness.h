// What the native tests share: two processes with a pipe between them, an engine with its thread, and checks that
// end the process with a line that says what differed.
#ifndef KVLINK_TESTS_HOST_HARNESS_H
#define KVLINK_TESTS_HOST_HARNESS_H

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvlink/provider.h"

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

#define CHECK_EQ(a, b)                                                                           \
  do {                                                                                           \
    const auto left_value = (a);                                                                 \
    const auto right_value = (b);                                                                \
    if (!(left_value == right_value)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #a,            \
                   static_cast<long long>(left_value), #b, static_cast<long long>(right_value)); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

namespace kvlink::test {

using Bytes = std::vector<uint8_t>;
using Options = std::vector<std::pair<std::string, std::string>>;

const kvl_provider &provider();
kvl_error make_error();

// False under an emulator that lacks process_vm_readv (KVLINK_TEST_WITHOUT_CMA is set there, by hand).
bool have_cma();
// The host provider's paths that can be tested here: shm, tcp, and cma where there is one.
std::vector<const char *> host_paths();

// Messages between the two processes of a test; an end of file or a minute of silence fails the test.
class Pipe {
 public:
  explicit Pipe(int fd) : fd_(fd) {}
  void send(const Bytes &message);
  Bytes receive();
  void signal() { send({1}); }
  void await() { receive(); }
  int fd() const { return fd_; }

 private:
  int fd_;
};

using Side = std::function<void(Pipe &)>;
// Runs `child` in a forked process and `parent` here; both must end well. Returns the child's pid to `parent`.
void run_pair(const char *name, const Side &parent, const Side &child);
pid_t child_pid();
// The child is expected to be killed.
void expect_child_killed();
int finish(const char *suite);

// An open engine and the thread that polls it, as the core has one.
class TestEngine {
 public:
  explicit TestEngine(const Options &options);
  TestEngine(const TestEngine &) = delete;
  TestEngine &operator=(const TestEngine &) = delete;
  ~TestEngine();

  kvl_engine *get() { return engine_; }
  kvl_completion await(uint64_t tag, int timeout_ms = 30000);
  bool completed(uint64_t tag);
  uint64_t statistic(const std::string &name);
  Bytes export_region(uint32_t mem);
  void open_region(uint32_t mem, void *address, uint64_t length, uint32_t access);
  uint8_t *allocate(uint64_t length);
  void pause();  // the thread stops polling
  void resume();

 private:
  void run();

  kvl_engine *engine_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, kvl_completion> done_;
  bool stop_ = false, pause_ = false, paused_ = false;
  std::thread thread_;
};

kvl_link_params link_params(uint32_t role, uint8_t session = 7, uint8_t key = 9);
kvl_link *open_link(TestEngine &engine, const kvl_link_params &params);
Bytes describe(kvl_link *link);

// Both sides call it: a connected link, made as the core makes it.
kvl_link *connect_pair(TestEngine &engine, Pipe &pipe, bool initiator);
// Sends this side's region description and opens the peer's under `rmem`.
void exchange_region(TestEngine &engine, kvl_link *link, Pipe &pipe, uint32_t mem, uint32_t rmem);
kvl_status open_remote(kvl_link *link, uint32_t rmem, const Bytes &blob, kvl_error *err);

// Submits and awaits; fails the test when the submit is refused.
kvl_completion transfer(TestEngine &engine, kvl_link *link, uint32_t operation, const std::vector<kvl_range> &ranges);
uint64_t next_tag();

// Reproducible bytes: position and seed decide each one.
uint8_t pattern(uint64_t seed, uint64_t position);
void fill(uint8_t *data, uint64_t length, uint64_t seed);

int open_descriptors();

}  // namespace kvlink::test

#endif  // KVLINK_TESTS_HOST_HARNESS_H
