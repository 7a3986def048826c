// A small test harness and a fixture: one channel over the scripted provider, a peer, two pieces of memory.
#pragma once

#include <dlfcn.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"
#include "fake.h"

struct TestCase {
  const char *name;
  void (*run)();
};
inline std::vector<TestCase> &test_cases() {
  static std::vector<TestCase> cases;
  return cases;
}
struct Register {
  Register(const char *name, void (*run)()) { test_cases().push_back({name, run}); }
};
#define TEST(name)                                    \
  static void name();                                 \
  static const Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                     \
    }                                                                                    \
  } while (0)

#define CHECK_EQ(left, right)                                                                                        \
  do {                                                                                                               \
    const auto left_value = static_cast<long long>(left);                                                            \
    const auto right_value = static_cast<long long>(right);                                                          \
    if (left_value != right_value) {                                                                                 \
      std::fprintf(stderr, "%s:%d: %s is %lld, expected %s = %lld\n", __FILE__, __LINE__, #left, left_value, #right, \
                   right_value);                                                                                     \
      std::_Exit(1);                                                                                                 \
    }                                                                                                                \
  } while (0)

#define CHECK_CONTAINS(text, part)                                                                 \
  do {                                                                                             \
    const std::string text_value = text;                                                           \
    if (text_value.find(part) == std::string::npos) {                                              \
      std::fprintf(stderr, "%s:%d: \"%s\" lacks \"%s\"\n", __FILE__, __LINE__, text_value.c_str(), \
                   std::string(part).c_str());                                                     \
      std::_Exit(1);                                                                               \
    }                                                                                              \
  } while (0)

using Clock = std::chrono::steady_clock;
inline double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Waits for a condition; the limit only bounds a failing test.
inline bool eventually(const std::function<bool()> &condition, int limit_ms = 10000) {
  const auto limit = Clock::now() + std::chrono::milliseconds(limit_ms);
  while (!condition()) {
    if (Clock::now() > limit) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

struct Error : kvl_error {
  Error() : kvl_error{} { struct_size = sizeof(kvl_error); }
};

inline std::string fake_path(const char *name) { return std::string(FAKE_DIR) + "/lib" + name + ".so"; }

inline FakeApi fake(const char *name = "fake") {
  void *library = dlopen(fake_path(name).c_str(), RTLD_NOW | RTLD_LOCAL);
  CHECK(library != nullptr);
  const auto get = reinterpret_cast<FakeApi (*)()>(dlsym(library, "fake_api"));
  CHECK(get != nullptr);
  return get();
}

inline kve_provider *load(const char *name = "fake") {
  Error err;
  kve_provider *provider = nullptr;
  if (kve_provider_load(fake_path(name).c_str(), &provider, &err) != KVL_OK) {
    std::fprintf(stderr, "load: %s\n", err.message);
    std::_Exit(1);
  }
  return provider;
}

inline kve_result result_of(const kve_transfer *transfer) {
  kve_result result{};
  result.struct_size = sizeof result;
  CHECK_EQ(kve_transfer_result(transfer, &result), KVL_OK);
  return result;
}

// Set the controls before making a Fixture; its destructor closes everything and checks that the engine broke no rule.
struct Fixture {
  FakeApi api = fake();
  FakeControl &control = *api.control;
  kve_channel *channel = nullptr;
  kve_peer *peer = nullptr;
  std::vector<char> local = std::vector<char>(1 << 16), remote = std::vector<char>(1 << 16);
  uint32_t mem = 0, rmem = 0;
  uint32_t default_timeout_ms;
  uint32_t grace_ms;

  explicit Fixture(uint32_t timeout_ms = 30000, uint32_t cancel_grace_ms = 500, uint32_t remote_access = 3)
      : default_timeout_ms(timeout_ms), grace_ms(cancel_grace_ms) {
    channel = open_channel();
    peer = open_peer();
    mem = open_mem(local);
    rmem = open_rmem(peer, remote, remote_access);
  }
  Fixture(const Fixture &) = delete;
  Fixture &operator=(const Fixture &) = delete;
  ~Fixture() {
    Error err;
    if (peer != nullptr) kve_peer_release(peer);
    const kvl_status status = kve_channel_close(channel, 5000, &err);
    if (status != KVL_OK) std::fprintf(stderr, "close: %s\n", err.message);
    CHECK_EQ(status, KVL_OK);
    kve_channel_release(channel);
    check_rules();
  }

  void check_rules() {
    std::lock_guard<std::mutex> lock(control.mutex);
    for (const std::string &what : control.violations)
      std::fprintf(stderr, "the engine broke a rule: %s\n", what.c_str());
    CHECK(control.violations.empty());
  }
  kve_channel *open_channel(const char *provider = "fake") {
    kve_channel_params params{};
    params.struct_size = sizeof params;
    params.default_timeout_ms = default_timeout_ms;
    params.cancel_grace_ms = grace_ms;
    params.device = "cpu";
    Error err;
    kve_channel *opened = nullptr;
    if (kve_channel_open(load(provider), &params, &opened, &err) != KVL_OK) std::fprintf(stderr, "%s\n", err.message);
    CHECK(opened != nullptr);
    return opened;
  }
  static kvl_link_params link_params(uint32_t role = KVL_ROLE_INITIATOR, const char *id = "peer-1") {
    kvl_link_params params{};
    params.struct_size = sizeof params;
    params.role = role;
    std::strncpy(params.local_id, "local", sizeof params.local_id - 1);
    std::strncpy(params.peer_id, id, sizeof params.peer_id - 1);
    return params;
  }
  kve_peer *open_peer(uint32_t role = KVL_ROLE_INITIATOR, const char *id = "peer-1") {
    const kvl_link_params params = link_params(role, id);
    Error err;
    kve_peer *opened = nullptr;
    CHECK_EQ(kve_peer_open(channel, &params, &opened, &err), KVL_OK);
    if (role == KVL_ROLE_INITIATOR) CHECK_EQ(kve_peer_connect(opened, "fake", 4, 1000, &err), KVL_OK);
    return opened;
  }
  static kvl_mem_desc describe(std::vector<char> &memory, uint32_t access = 3) {
    kvl_mem_desc desc{};
    desc.struct_size = sizeof desc;
    desc.kind = KVL_MEMORY_HOST;
    desc.device = -1;
    desc.access = access;
    desc.address = reinterpret_cast<uint64_t>(memory.data());
    desc.length = memory.size();
    return desc;
  }
  uint32_t open_mem(std::vector<char> &memory) {
    const kvl_mem_desc desc = describe(memory);
    Error err;
    uint32_t handle = 0;
    CHECK_EQ(kve_mem_open(channel, &desc, &handle, &err), KVL_OK);
    return handle;
  }
  static uint32_t open_rmem(kve_peer *of, std::vector<char> &memory, uint32_t access = 3) {
    const uint64_t blob[2] = {reinterpret_cast<uint64_t>(memory.data()), memory.size()};
    Error err;
    uint32_t handle = 0;
    CHECK_EQ(kve_rmem_open(of, blob, sizeof blob, memory.size(), access, 1000, &handle, &err), KVL_OK);
    return handle;
  }
  kvl_range range(uint64_t local_offset, uint64_t remote_offset, uint64_t length) const {
    return {mem, rmem, local_offset, remote_offset, length};
  }
  kve_transfer *submit(const std::vector<kvl_range> &ranges, uint32_t operation = KVL_PUT, uint32_t timeout_ms = 0,
                       uint32_t flags = 0) {
    Error err;
    kve_transfer *transfer = nullptr;
    const kvl_status status =
        kve_submit(peer, operation, ranges.data(), ranges.size(), 0, timeout_ms, flags, &transfer, &err);
    if (status != KVL_OK) std::fprintf(stderr, "submit: %s\n", err.message);
    CHECK_EQ(status, KVL_OK);
    return transfer;
  }
  // Submits, expecting a refusal.
  kvl_status refused(const std::vector<kvl_range> &ranges, Error &err, uint32_t operation = KVL_PUT) {
    kve_transfer *transfer = nullptr;
    const kvl_status status = kve_submit(peer, operation, ranges.data(), ranges.size(), 0, 0, 0, &transfer, &err);
    CHECK(status != KVL_OK);
    CHECK(transfer == nullptr);
    CHECK_EQ(err.status, status);
    CHECK(err.message[0] != '\0');
    return status;
  }
  kve_statistics statistics() {
    kve_statistics out{};
    out.struct_size = sizeof out;
    CHECK_EQ(kve_channel_statistics(channel, &out), KVL_OK);
    return out;
  }
};

// Waits for the end and gives the result; releases the transfer.
inline kve_result finish(kve_transfer *transfer, uint32_t timeout_ms = 20000) {
  CHECK_EQ(kve_transfer_wait(transfer, timeout_ms), 1);
  const kve_result result = result_of(transfer);
  kve_transfer_release(transfer);
  return result;
}

// Every test runs in a process of its own: it starts from the default script, and one that hangs or crashes says which.
int main(int argc, char **argv) {
  int failures = 0;
  for (const TestCase &test : test_cases()) {
    if (argc > 1) {
      if (std::strcmp(argv[1], test.name) != 0) continue;
      test.run();
      return 0;
    }
    const auto start = Clock::now();
    // Under an emulator the kernel cannot start this program by itself: KVLINK_TEST_EMULATOR names who can.
    const char *emulator = std::getenv("KVLINK_TEST_EMULATOR");
    char self[4096] = {};
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    std::string name = test.name;
    std::string starter = emulator != nullptr ? emulator : self;
    char *emulated[] = {starter.data(), self, name.data(), nullptr};
    char *arguments[] = {self, name.data(), nullptr};
    pid_t child = -1;
    CHECK_EQ(
        posix_spawnp(&child, starter.c_str(), nullptr, nullptr, emulator != nullptr ? emulated : arguments, environ),
        0);
    int status = 0;
    CHECK_EQ(waitpid(child, &status, 0), child);
    std::printf("%-45s %s (%.0f ms)\n", test.name, status == 0 ? "ok" : "FAILED", ms_since(start));
    std::fflush(stdout);
    if (status != 0) ++failures;
  }
  return argc > 1 || failures > 0 ? 1 : 0;
}
