// Every path, both operations, both roles as the one who submits, sizes from a byte to 16 MiB in up to 8192 blocks:
// the bytes arrive, and not a byte around them changes.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "harness.h"

using namespace kvlink::test;

namespace {

constexpr uint64_t kRegionBytes = uint64_t{50} << 20;
constexpr uint32_t kMem = 3, kRemote = 5;

struct Shape {
  uint64_t size;
  uint64_t count;
};

const Shape kShapes[] = {{1, 1},        {1, 8192},     {7, 100},           {63, 1000},    {64, 8192},
                         {511, 333},    {4096, 1},     {4096, 16},         {4097, 17},    {4096, 8192},
                         {16384, 1000}, {65536, 1},    {65537, 200},       {65536, 512},  {(1 << 20) - 1, 3},
                         {1 << 20, 1},  {1 << 20, 33}, {(1 << 20) + 1, 5}, {16 << 20, 1}, {16 << 20, 3}};

// The thread sanitizer needs a minute for what takes a second; it learns nothing from more bytes of the same kind.
bool skipped(const Shape &shape) {
#if defined(__SANITIZE_THREAD__)
  return shape.size * shape.count > 6 << 20;
#else
  static_cast<void>(shape);
  return false;
#endif
}

// The part of the regions that a shape uses, and a page more.
uint64_t extent(const Shape &shape) {
  const uint64_t bytes = shape.count * (shape.size + 29) + 4096;
  CHECK(bytes <= kRegionBytes);
  return bytes;
}

// The blocks of a shape in random order with gaps on both sides.
std::vector<kvl_range> make_ranges(const Shape &shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> slots(shape.count);
  std::iota(slots.begin(), slots.end(), uint64_t{0});
  std::vector<uint64_t> remote_slots = slots;
  std::shuffle(slots.begin(), slots.end(), random);
  std::shuffle(remote_slots.begin(), remote_slots.end(), random);
  const uint64_t local_step = shape.size + 13, remote_step = shape.size + 29;
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < shape.count; ++i) {
    ranges.push_back({kMem, kRemote, 5 + slots[i] * local_step, 11 + remote_slots[i] * remote_step, shape.size});
  }
  return ranges;
}

// What the receiving region must hold: its old bytes, but for the blocks.
void expect_blocks(const uint8_t *data, uint64_t length, uint64_t old_seed, uint64_t source_seed,
                   const std::vector<kvl_range> &ranges, bool receiver_is_remote) {
  Bytes expected(length);
  fill(expected.data(), length, old_seed);
  Bytes source(length);
  fill(source.data(), length, source_seed);
  for (const kvl_range &range : ranges) {
    const uint64_t to = receiver_is_remote ? range.remote_offset : range.local_offset;
    const uint64_t from = receiver_is_remote ? range.local_offset : range.remote_offset;
    std::memcpy(&expected[to], &source[from], range.length);
  }
  if (std::memcmp(data, expected.data(), length) == 0) return;
  for (uint64_t i = 0; i < length; ++i) {
    if (data[i] != expected[i]) {
      std::fprintf(stderr, "byte %llu is %u, expected %u\n", static_cast<unsigned long long>(i), data[i], expected[i]);
      std::exit(1);
    }
  }
}

// One side submits all shapes; the other checks what it received or sent.
void submitter(TestEngine &engine, kvl_link *link, Pipe &pipe, uint8_t *data, uint32_t path) {
  uint64_t round = 0;
  for (const Shape &shape : kShapes) {
    if (skipped(shape)) continue;
    for (const uint32_t operation : {KVL_PUT, KVL_GET}) {
      ++round;
      const auto ranges = make_ranges(shape, round);
      fill(data, extent(shape), 2 * round);
      pipe.signal();
      pipe.await();
      const kvl_completion done = transfer(engine, link, operation, ranges);
      if (done.status != KVL_OK) std::fprintf(stderr, "%s: %s\n", done.site, done.message);
      CHECK_EQ(done.status, KVL_OK);
      CHECK_EQ(done.path, path);
      CHECK_EQ(done.bytes, shape.size * shape.count);
      if (operation == KVL_GET) expect_blocks(data, extent(shape), 2 * round, 2 * round + 1, ranges, false);
      pipe.signal();
      pipe.await();
    }
  }
}

void target(Pipe &pipe, uint8_t *data) {
  uint64_t round = 0;
  for (const Shape &shape : kShapes) {
    if (skipped(shape)) continue;
    for (const uint32_t operation : {KVL_PUT, KVL_GET}) {
      ++round;
      fill(data, extent(shape), 2 * round + 1);
      pipe.await();
      pipe.signal();
      pipe.await();
      if (operation == KVL_PUT)
        expect_blocks(data, extent(shape), 2 * round + 1, 2 * round, make_ranges(shape, round), true);
      pipe.signal();
    }
  }
}

void side(Pipe &pipe, bool initiator, bool submits, const char *path, uint32_t number, const Options &more) {
  Options options = more;
  options.emplace_back("path", path);
  TestEngine engine(options);
  uint8_t *data = engine.allocate(kRegionBytes);
  engine.open_region(kMem, data, kRegionBytes, KVL_ACCESS_READ | KVL_ACCESS_WRITE);
  kvl_link *link = connect_pair(engine, pipe, initiator);
  exchange_region(engine, link, pipe, kMem, kRemote);
  if (submits) {
    submitter(engine, link, pipe, data, number);
  } else {
    target(pipe, data);
  }
  pipe.signal();
  pipe.await();
  provider().rmem_close(link, kRemote);
  provider().link_close(link, 1000);
  kvl_error err = make_error();
  CHECK_EQ(provider().mem_close(engine.get(), kMem, &err), KVL_OK);
  provider().mem_free(engine.get(), reinterpret_cast<uint64_t>(data));
}

void run(const char *path, uint32_t number, bool acceptor_submits, const Options &more) {
  const std::string name = std::string(path) + (acceptor_submits ? ", acceptor submits" : ", initiator submits");
  run_pair(
      name.c_str(), [&](Pipe &pipe) { side(pipe, true, !acceptor_submits, path, number, more); },
      [&](Pipe &pipe) { side(pipe, false, acceptor_submits, path, number, more); });
}

}  // namespace

int main(int argc, char **argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const char *paths[] = {"shm", "cma", "tcp"};
  for (uint32_t i = 0; i < 3; ++i) {
    if (!only.empty() && only != paths[i]) continue;
    if (i == 1 && !have_cma()) continue;
    for (const bool acceptor : {false, true}) run(paths[i], i, acceptor, {{"threads", "2"}});
  }
  if (only.empty() || only == "tcp") {
    run("tcp", 2, false, {{"bind_host", "::1"}, {"streams", "1"}});
    run("tcp", 2, true, {{"bind_host", "localhost"}, {"streams", "5"}});
  }
  return finish("data");
}
