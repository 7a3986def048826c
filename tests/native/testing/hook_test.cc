// Drives the hook over the host provider through the engine: limits, delays, injected failures, BOTH mode, many
// threads. Arguments: the hook's library, the host provider's path option.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"

namespace {

std::string g_library, g_path, g_folder;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

kvl_error NewError() {
  kvl_error error{};
  error.struct_size = sizeof error;
  return error;
}

using Options = std::map<std::string, std::string>;

// A channel with one region of memory that any path serves.
struct End {
  kve_channel *channel = nullptr;
  kve_peer *peer = nullptr;
  uint64_t address = 0, length = 0;
  uint32_t mem = 0, rmem = 0;
  std::string log;

  void Open(const std::string &name, Options options, uint64_t bytes) {
    log = g_folder + "/" + name + ".log";
    options["path"] = g_path;
    options["hook_log"] = log;
    options["hook_rendezvous"] = g_folder;
    std::vector<kvl_option> table;
    for (const auto &option : options) table.push_back({option.first.c_str(), option.second.c_str()});
    kvl_error error = NewError();
    kve_provider *provider = nullptr;
    CHECK(kve_provider_load(g_library.c_str(), &provider, &error) == KVL_OK, "%s", error.message);
    kve_channel_params params{};
    params.struct_size = sizeof params;
    params.default_timeout_ms = 20000;
    params.cancel_grace_ms = 1000;
    params.option_count = static_cast<uint32_t>(table.size());
    params.options = table.data();
    params.device = "cpu";
    CHECK(kve_channel_open(provider, &params, &channel, &error) == KVL_OK, "%s", error.message);
    length = bytes;
    CHECK(kve_mem_alloc(channel, KVL_MEMORY_HOST, length, &address, &error) == KVL_OK, "%s", error.message);
    kvl_mem_desc desc{};
    desc.struct_size = sizeof desc;
    desc.kind = KVL_MEMORY_HOST;
    desc.device = -1;
    desc.access = KVL_ACCESS_READ | KVL_ACCESS_WRITE;
    desc.address = address;
    desc.length = length;
    CHECK(kve_mem_open(channel, &desc, &mem, &error) == KVL_OK, "%s", error.message);
  }

  unsigned char *bytes() const { return reinterpret_cast<unsigned char *>(address); }

  void Link(uint32_t role, const char *id, const char *other) {
    kvl_link_params params{};
    params.struct_size = sizeof params;
    params.role = role;
    params.epoch = 1;
    std::memset(params.session, 7, sizeof params.session);
    std::memset(params.session_key, 9, sizeof params.session_key);
    std::snprintf(params.local_id, sizeof params.local_id, "%s", id);
    std::snprintf(params.peer_id, sizeof params.peer_id, "%s", other);
    kvl_error error = NewError();
    CHECK(kve_peer_open(channel, &params, &peer, &error) == KVL_OK, "%s", error.message);
  }

  std::vector<char> Blob(bool region) const {
    std::vector<char> blob(4096);
    uint64_t size = blob.size();
    kvl_error error = NewError();
    const kvl_status status = region ? kve_mem_export(channel, mem, blob.data(), &size, &error)
                                     : kve_peer_describe(peer, blob.data(), &size, &error);
    CHECK(status == KVL_OK, "%s", error.message);
    blob.resize(size);
    return blob;
  }

  void Import(const End &other) {
    const std::vector<char> blob = other.Blob(true);
    kvl_error error = NewError();
    CHECK(kve_rmem_open(peer, blob.data(), blob.size(), other.length, KVL_ACCESS_READ | KVL_ACCESS_WRITE, 5000, &rmem,
                        &error) == KVL_OK,
          "%s", error.message);
  }

  kve_transfer *Submit(uint32_t operation, const std::vector<kvl_range> &ranges) const {
    kvl_error error = NewError();
    kve_transfer *transfer = nullptr;
    CHECK(kve_submit(peer, operation, ranges.data(), ranges.size(), 0, 0, 0, &transfer, &error) == KVL_OK, "%s",
          error.message);
    return transfer;
  }

  void Close() {
    if (peer != nullptr) kve_peer_close(peer, KVL_CANCELLED, "the test closes", 500);
    kvl_error error = NewError();
    CHECK(kve_channel_close(channel, 3000, &error) == KVL_OK, "%s", error.message);
    if (peer != nullptr) kve_peer_release(peer);
    kve_channel_release(channel);
    std::ifstream file(log);
    int calls = 0;
    for (std::string line; std::getline(file, line); ++calls) {
      CHECK(line.compare(0, 9, "VIOLATION") != 0, "%s", line.c_str());
    }
    CHECK(calls > 0, "the hook wrote no log");
  }
};

kve_result Finish(kve_transfer *transfer) {
  CHECK(kve_transfer_wait(transfer, 30000) == 1, "a transfer hangs");
  kve_result result{};
  result.struct_size = sizeof result;
  kve_transfer_result(transfer, &result);
  kve_transfer_release(transfer);
  return result;
}

constexpr uint64_t kBytes = 1 << 20;

void Connect(End *a, End *b, const Options &a_options, const Options &b_options) {
  a->Open("a", a_options, kBytes);
  b->Open("b", b_options, kBytes);
  a->Link(KVL_ROLE_INITIATOR, "a", "b");
  b->Link(KVL_ROLE_ACCEPTOR, "b", "a");
  const std::vector<char> blob_a = a->Blob(false), blob_b = b->Blob(false);
  std::thread acceptor;
  if (a_options.count("hook_mode") != 0) {
    acceptor = std::thread([&] {
      kvl_error error = NewError();
      CHECK(kve_peer_connect(b->peer, blob_a.data(), blob_a.size(), 10000, &error) == KVL_OK, "%s", error.message);
    });
  }
  kvl_error error = NewError();
  CHECK(kve_peer_connect(a->peer, blob_b.data(), blob_b.size(), 10000, &error) == KVL_OK, "%s", error.message);
  if (acceptor.joinable()) acceptor.join();
  a->Import(*b);
  b->Import(*a);
}

// Four threads a side move disjoint parts; the bytes of both sides are compared.
void Move(const Options &options) {
  End a, b;
  Connect(&a, &b, options, options);
  constexpr uint64_t kParts = 4, kPart = kBytes / kParts, kBlock = 1024;
  for (uint64_t i = 0; i < kBytes; ++i) a.bytes()[i] = static_cast<unsigned char>(i * 31 >> 3);
  std::vector<std::thread> threads;
  for (uint64_t part = 0; part < kParts; ++part) {
    threads.emplace_back([&, part] {
      // Every other block goes by put from a, the rest by get from b.
      std::vector<kvl_range> puts, gets;
      for (uint64_t at = part * kPart; at < (part + 1) * kPart; at += 2 * kBlock) {
        puts.push_back({a.mem, a.rmem, at, at, kBlock});
        gets.push_back({b.mem, b.rmem, at + kBlock, at + kBlock, kBlock});
      }
      kve_transfer *put = a.Submit(KVL_PUT, puts);
      kve_transfer *get = b.Submit(KVL_GET, gets);
      const kve_result put_result = Finish(put), get_result = Finish(get);
      CHECK(put_result.status == KVL_OK, "put: %s", put_result.message);
      CHECK(get_result.status == KVL_OK, "get: %s", get_result.message);
    });
  }
  for (std::thread &thread : threads) thread.join();
  for (const End *end : {&a, &b}) {
    // A put's bytes are ordered before its completion by the way of its acknowledgement through the kernel, where the
    // thread sanitizer cannot see it. Closing the region takes the lock under which they were written.
    kvl_error error = NewError();
    CHECK(kve_mem_close(end->channel, end->mem, 5000, &error) == KVL_OK, "%s", error.message);
  }
  CHECK(std::memcmp(a.bytes(), b.bytes(), kBytes) == 0, "the bytes differ");
  a.Close();
  b.Close();
}

// Cancels and closes while work waits in the hook.
void CancelAndClose() {
  End a, b;
  Connect(&a, &b, {{"hook_defer_ms", "60000"}}, {});
  std::vector<kve_transfer *> transfers;
  for (int i = 0; i < 8; ++i) transfers.push_back(a.Submit(KVL_PUT, {{a.mem, a.rmem, 0, 0, kBytes}}));
  std::thread cancel([&] {
    for (int i = 0; i < 4; ++i) kve_transfer_cancel(transfers[static_cast<size_t>(i)]);
  });
  cancel.join();
  for (size_t i = 0; i < 4; ++i) {
    const kve_result result = Finish(transfers[i]);
    CHECK(result.status == KVL_CANCELLED, "status %d: %s", result.status, result.message);
  }
  kve_peer_close(a.peer, KVL_LINK_DOWN, "gone", 500);
  for (size_t i = 4; i < 8; ++i) {
    const kve_result result = Finish(transfers[i]);
    CHECK(result.status != KVL_OK && result.message[0] != '\0', "status %d", result.status);
  }
  a.Close();
  b.Close();
}

// The second completion fails as told, with the marked code; the third is good again.
void Injected() {
  End a, b;
  Connect(&a, &b, {{"hook_fail", "poll:2:REMOTE"}}, {});
  for (int i = 1; i <= 3; ++i) {
    const kve_result result = Finish(a.Submit(KVL_GET, {{a.mem, a.rmem, 0, 0, kBytes}}));
    CHECK((result.status == KVL_OK) == (i != 2), "transfer %d: status %d: %s", i, result.status, result.message);
    if (i == 2) CHECK(result.status == KVL_REMOTE && result.vendor_code == 4937292, "status %d", result.status);
  }
  a.Close();
  b.Close();
}

// One side alone in BOTH mode fails at its deadline, or at once when interrupted.
void Alone() {
  for (const bool interrupt : {false, true}) {
    End a;
    a.Open("a", {{"hook_mode", "both"}}, kBytes);
    a.Link(KVL_ROLE_INITIATOR, "a", "b");
    const std::vector<char> blob = a.Blob(false);
    const auto start = std::chrono::steady_clock::now();
    std::atomic<bool> done{false};
    std::thread interrupter;
    if (interrupt) {
      interrupter = std::thread([&] {
        while (!done) {
          kve_peer_interrupt(a.peer);
          std::this_thread::yield();
        }
      });
    }
    kvl_error error = NewError();
    const kvl_status status = kve_peer_connect(a.peer, blob.data(), blob.size(), interrupt ? 20000 : 200, &error);
    done = true;
    if (interrupter.joinable()) interrupter.join();
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(status == (interrupt ? KVL_CANCELLED : KVL_TIMEOUT), "status %d: %s", status, error.message);
    CHECK(took < std::chrono::seconds(10), "it took its time");
    a.Close();
  }
}

}  // namespace

int main(int argc, char **argv) {
  CHECK(argc == 3, "arguments: HOOK_LIBRARY PATH");
  g_library = argv[1];
  g_path = argv[2];
  const char *base = std::getenv("TMPDIR");
  g_folder = std::string(base != nullptr ? base : "/tmp") + "/kvlink-hook-test-XXXXXX";
  CHECK(mkdtemp(&g_folder[0]) != nullptr, "mkdtemp");
  Move({});
  Move({{"hook_max_ranges", "3"}, {"hook_max_range_bytes", "512"}, {"hook_depth", "2"}, {"hook_delay_ms", "1"}});
  Move({{"hook_defer_ms", "5"}, {"hook_mask", "CANCEL,LINK_CHECK,STATISTICS"}});
  Move({{"hook_mode", "both"}, {"hook_connect_ms", "30"}});
  CancelAndClose();
  Injected();
  Alone();
  for (const char *name : {"/a.log", "/b.log"}) unlink((g_folder + name).c_str());
  CHECK(rmdir(g_folder.c_str()) == 0, "something is left in %s", g_folder.c_str());
  std::puts("ok");
  return 0;
}
