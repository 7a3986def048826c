// Measures the provider alone, without the engine and Python above it: two processes, medians of five, and beside each
// figure what the machine itself does over the same footprint.
//   host_speed [shm|cma|tcp] [block bytes] [blocks] [put|get] [contiguous]
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <random>

#include "copy.h"
#include "harness.h"
#include "socket.h"

using namespace kvlink::test;
namespace host = kvlink::host;

namespace {

constexpr uint64_t kBytes = uint64_t{600} << 20;
constexpr uint32_t kMem = 3, kRemote = 5;
constexpr int kRepeats = 5;

double now() { return static_cast<double>(host::now_ns()) * 1e-9; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<kvl_range> make_ranges(uint64_t size, uint64_t count, bool contiguous) {
  std::mt19937_64 random(42);
  const uint64_t slots = contiguous ? count : std::min(kBytes / size, count * 2);
  std::vector<uint64_t> local(slots), remote(slots);
  std::iota(local.begin(), local.end(), uint64_t{0});
  std::iota(remote.begin(), remote.end(), uint64_t{0});
  if (!contiguous) {
    std::shuffle(local.begin(), local.end(), random);
    std::shuffle(remote.begin(), remote.end(), random);
  }
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < count; ++i) ranges.push_back({kMem, kRemote, local[i] * size, remote[i] * size, size});
  return ranges;
}

// One thread, memcpy and non-temporal, over two private regions of the same size and the same blocks.
void copy_limit(const std::vector<kvl_range> &ranges, uint8_t *from, uint8_t *to) {
  std::vector<iovec> source, target;
  for (const kvl_range &range : ranges) {
    source.push_back({from + range.local_offset, range.length});
    target.push_back({to + range.remote_offset, range.length});
  }
  const double bytes = static_cast<double>(ranges.size() * ranges[0].length);
  std::vector<double> plain, streaming;
  for (int i = 0; i < kRepeats; ++i) {
    double begin = now();
    for (size_t j = 0; j < source.size(); ++j) {
      std::memcpy(target[j].iov_base, source[j].iov_base, source[j].iov_len);
    }
    plain.push_back(bytes / (now() - begin) * 1e-9);
    begin = now();
    host::copy_pieces(target.data(), source.data(), source.size(), host::CopyHint::kStreaming);
    streaming.push_back(bytes / (now() - begin) * 1e-9);
  }
  std::printf("  one-thread copy: memcpy %.2f GB/s, non-temporal %.2f GB/s\n", median(plain), median(streaming));
}

void measure(TestEngine &engine, kvl_link *link, uint32_t operation, const std::vector<kvl_range> &ranges) {
  const double bytes = static_cast<double>(ranges.size() * ranges[0].length);
  std::vector<double> rates, times;
  for (int i = 0; i <= kRepeats; ++i) {
    const double begin = now();
    CHECK_EQ(transfer(engine, link, operation, ranges).status, KVL_OK);
    if (i > 0) rates.push_back(bytes / (now() - begin) * 1e-9);
  }
  std::printf("  batch of %zu x %llu: %.2f GB/s\n", ranges.size(), static_cast<unsigned long long>(ranges[0].length),
              median(rates));
  for (int i = 0; i < 2000; ++i) {
    const double begin = now();
    CHECK_EQ(transfer(engine, link, operation, {{kMem, kRemote, 0, 0, 4096}}).status, KVL_OK);
    times.push_back((now() - begin) * 1e6);
  }
  std::sort(times.begin(), times.end());
  std::printf("  one 4 KiB block, through another thread's poll: p50 %.1f us, p99 %.1f us\n", times[1000], times[1980]);
}

// The same without a second thread: submit, then poll and wait here, as a blocking caller of the engine does.
void measure_alone(TestEngine &engine, kvl_link *link, uint32_t operation) {
  engine.pause();
  std::vector<double> times;
  const kvl_range range{kMem, kRemote, 0, 0, 4096};
  for (int i = 0; i < 2000; ++i) {
    const double begin = now();
    kvl_completion done{};
    kvl_error err = make_error();
    if (provider().submit(link, operation, &range, 1, 0, next_tag(), &done, &err) != KVL_DONE) {
      for (uint32_t count = 0; count == 0;) {
        uint32_t more = 0;
        count = 1;
        CHECK_EQ(provider().poll(engine.get(), &done, &count, &more, &err), KVL_OK);
      }
    }
    times.push_back((now() - begin) * 1e6);
  }
  engine.resume();
  std::sort(times.begin(), times.end());
  std::printf("  one 4 KiB block, polled here: p50 %.1f us, p99 %.1f us\n", times[1000], times[1980]);
}

// A plain socket stream and a blocking put-and-acknowledge, both in C over loopback.
void socket_limit() {
  host::UniqueFd listener;
  uint16_t port = 0;
  CHECK(host::listen_tcp("127.0.0.1", 0, &listener, &port).ok());
  constexpr size_t kPing = 4096;
  constexpr uint64_t kStream = uint64_t{1} << 30;
  const pid_t child = fork();
  CHECK(child >= 0);
  const host::Deadline deadline{host::now_ns() + 60000000000u, -1};
  if (child == 0) {
    CHECK(host::wait_for(listener.get(), 1, deadline, "accept").ok());
    host::UniqueFd fd(accept(listener.get(), nullptr, nullptr));
    host::tune_tcp(fd.get());
    std::vector<char> buffer(4 << 20);
    char ack = 1;
    for (int i = 0; i < 2000; ++i) {
      CHECK_EQ(recv(fd.get(), buffer.data(), kPing, MSG_WAITALL), static_cast<ssize_t>(kPing));
      CHECK_EQ(send(fd.get(), &ack, 1, 0), 1);
    }
    for (const size_t size : {size_t{64} << 10, size_t{256} << 10, size_t{1} << 20, size_t{4} << 20}) {
      for (uint64_t left = kStream; left > 0;) {
        const ssize_t got = recv(fd.get(), buffer.data(), std::min<uint64_t>(size, left), 0);
        CHECK(got > 0);
        left -= static_cast<uint64_t>(got);
      }
      CHECK_EQ(send(fd.get(), &ack, 1, 0), 1);
    }
    _exit(0);
  }
  host::UniqueFd fd(socket(AF_INET, SOCK_STREAM, 0));
  std::vector<host::Address> addresses;
  CHECK(host::resolve("127.0.0.1", port, false, &addresses).ok());
  CHECK_EQ(connect(fd.get(), reinterpret_cast<sockaddr *>(&addresses[0].storage), addresses[0].length), 0);
  host::tune_tcp(fd.get());
  std::vector<char> buffer(4 << 20, 1);
  char ack = 0;
  std::vector<double> times;
  for (int i = 0; i < 2000; ++i) {
    const double begin = now();
    CHECK_EQ(send(fd.get(), buffer.data(), kPing, 0), static_cast<ssize_t>(kPing));
    CHECK_EQ(recv(fd.get(), &ack, 1, 0), 1);
    times.push_back((now() - begin) * 1e6);
  }
  std::sort(times.begin(), times.end());
  std::printf("  plain socket: 4 KiB and acknowledgement p50 %.1f us\n", times[1000]);
  for (const size_t size : {size_t{64} << 10, size_t{256} << 10, size_t{1} << 20, size_t{4} << 20}) {
    const double begin = now();
    for (uint64_t left = kStream; left > 0;) {
      const ssize_t sent = send(fd.get(), buffer.data(), std::min<uint64_t>(size, left), 0);
      CHECK(sent > 0);
      left -= static_cast<uint64_t>(sent);
    }
    CHECK_EQ(recv(fd.get(), &ack, 1, 0), 1);
    std::printf("  plain socket stream, %zu KiB a call: %.2f GB/s\n", size >> 10,
                static_cast<double>(kStream) / (now() - begin) * 1e-9);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
}

void cma_limit(const std::vector<kvl_range> &ranges, uint8_t *local, const Bytes &peer_region, pid_t pid, bool put) {
  uint64_t base = 0;
  std::memcpy(&base, peer_region.data() + 24, sizeof base);  // RegionBlob::address
  std::vector<double> rates;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double begin = now();
    for (size_t at = 0; at < ranges.size();) {
      iovec mine[1024], theirs[1024];
      size_t count = 0;
      for (; at < ranges.size() && count < 1024; ++at, ++count) {
        mine[count] = {local + ranges[at].local_offset, ranges[at].length};
        theirs[count] = {reinterpret_cast<void *>(base + ranges[at].remote_offset), ranges[at].length};
      }
      CHECK((put ? process_vm_writev(pid, mine, count, theirs, count, 0)
                 : process_vm_readv(pid, mine, count, theirs, count, 0)) > 0);
    }
    rates.push_back(static_cast<double>(ranges.size() * ranges[0].length) / (now() - begin) * 1e-9);
  }
  std::printf("  bare process_vm: %.2f GB/s\n", median(rates));
}

void run(const char *path, uint64_t size, uint64_t count, uint32_t operation, bool contiguous, const char *threads) {
  const auto ranges = make_ranges(size, count, contiguous);
  Options options = {{"path", path}};
  if (threads != nullptr) options.emplace_back("threads", threads);
  const std::string name = std::string(path) + (operation == KVL_PUT ? " put" : " get");
  if (std::strcmp(path, "tcp") == 0) socket_limit();
  run_pair(
      name.c_str(),
      [&](Pipe &pipe) {
        TestEngine engine(options);
        uint8_t *data = engine.allocate(kBytes);
        std::memset(data, 1, kBytes);
        engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
        kvl_link *link = connect_pair(engine, pipe, true);
        exchange_region(engine, link, pipe, kMem, kRemote);
        const Bytes peer_region = pipe.receive();
        if (std::strcmp(path, "shm") == 0) {
          uint8_t *other = engine.allocate(kBytes);
          std::memset(other, 1, kBytes);
          copy_limit(ranges, operation == KVL_PUT ? data : other, operation == KVL_PUT ? other : data);
          provider().mem_free(engine.get(), reinterpret_cast<uint64_t>(other));
        }
        if (std::strcmp(path, "cma") == 0) cma_limit(ranges, data, peer_region, child_pid(), operation == KVL_PUT);
        measure(engine, link, operation, ranges);
        measure_alone(engine, link, operation);
        pipe.signal();
        provider().link_close(link, 100);
      },
      [&](Pipe &pipe) {
        TestEngine engine(options);
        uint8_t *data = engine.allocate(kBytes);
        std::memset(data, 2, kBytes);
        engine.open_region(kMem, data, kBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
        kvl_link *link = connect_pair(engine, pipe, false);
        exchange_region(engine, link, pipe, kMem, kRemote);
        pipe.send(engine.export_region(kMem));
        pipe.await();
        provider().link_close(link, 100);
      });
}

}  // namespace

int main(int argc, char **argv) {
  const char *path = argc > 1 ? argv[1] : "shm";
  const uint64_t size = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 65536;
  const uint64_t count = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 4096;
  const uint32_t operation = argc > 4 && std::strcmp(argv[4], "get") == 0 ? KVL_GET : KVL_PUT;
  const bool contiguous = argc > 5 && std::strcmp(argv[5], "contiguous") == 0;
  run(path, size, count, operation, contiguous, argc > 6 ? argv[6] : nullptr);
  return 0;
}
