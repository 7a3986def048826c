// The one pass over the ranges: what it refuses and with which words, what it merges, how it splits.
#include <random>

#include "harness.h"

TEST(refuses_ranges_outside_their_regions) {
  Fixture f;
  Error err;
  std::vector<kvl_range> ranges(17, f.range(0, 0, 16));
  ranges.push_back(f.range(65536 - 4096, 0, 8192));
  CHECK_EQ(f.refused(ranges, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "range 17: local_offset 61440 + length 8192 = 69632 is past the end");
  CHECK_CONTAINS(err.message, "(65536 bytes)");
  CHECK_EQ(f.refused({f.range(0, 65535, 2)}, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "range 0: remote_offset 65535 + length 2 = 65537 is past the end");
  CHECK_EQ(f.refused({f.range(UINT64_MAX - 3, 0, 8)}, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "overflows 64 bits");
  CHECK_EQ(f.refused({f.range(0, UINT64_MAX, 1)}, err), KVL_INVALID);
  CHECK_EQ(f.refused({f.range(0, 0, UINT64_MAX)}, err), KVL_INVALID);
  CHECK_EQ(f.refused({f.range(70000, 0, 0)}, err), KVL_INVALID);  // an empty range has to lie inside too
  CHECK_EQ(f.control.submits, 0);
  CHECK_EQ(f.statistics().submitted, 0);
  kve_transfer_release(f.submit({f.range(65535, 65535, 1), f.range(65536, 65536, 0)}));
}

TEST(refuses_wrong_handles) {
  Fixture f;
  Error err;
  CHECK_EQ(f.refused({{f.mem + 1, f.rmem, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "local region handle");
  CHECK_EQ(f.refused({{f.mem, f.rmem + 1, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "remote region handle");
  CHECK_EQ(f.refused({{0, f.rmem, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_EQ(f.refused({{f.mem, 0, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_EQ(f.refused({{f.mem ^ (1u << KVL_HANDLE_INDEX_BITS), f.rmem, 0, 0, 1}}, err), KVL_INVALID);
  kve_peer *other = f.open_peer(KVL_ROLE_INITIATOR, "peer-2");
  const uint32_t theirs = Fixture::open_rmem(other, f.remote);
  CHECK_EQ(f.refused({{f.mem, theirs, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "belongs to another peer than 'peer-1'");
  kve_peer_release(other);
  // A refused batch holds no region: closing does not wait.
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 0, &err), KVL_OK);
}

TEST(refuses_a_stale_handle) {
  Fixture f;
  Error err;
  std::vector<char> memory(4096);
  std::vector<uint32_t> handles;
  for (int i = 0; i < 300; ++i) {
    const uint32_t handle = f.open_mem(memory);
    for (const uint32_t old : handles) CHECK(old != handle);
    handles.push_back(handle);
    CHECK_EQ(kve_mem_close(f.channel, handle, 1000, &err), KVL_OK);
  }
  const uint32_t live = f.open_mem(memory);
  for (const uint32_t old : handles) CHECK_EQ(f.refused({{old, f.rmem, 0, 0, 1}}, err), KVL_INVALID);
  CHECK_EQ(kve_mem_close(f.channel, handles[0], 0, &err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "closed already");
  CHECK((live & ((1u << KVL_HANDLE_INDEX_BITS) - 1)) < 80);  // the table stays dense
}

TEST(refuses_what_the_peer_did_not_publish) {
  {
    Fixture f(1000, 100, KVL_ACCESS_READ);
    Error err;
    CHECK_EQ(f.refused({f.range(0, 0, 1)}, err, KVL_PUT), KVL_DENIED);
    CHECK_CONTAINS(err.message, "reading only");
    CHECK_EQ(finish(f.submit({f.range(0, 0, 1)}, KVL_GET)).status, KVL_OK);
  }
  Fixture f(1000, 100, KVL_ACCESS_WRITE);
  Error err;
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err, KVL_GET), KVL_DENIED);
  CHECK_CONTAINS(err.message, "peer-1");
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err, 2), KVL_INVALID);
}

TEST(refuses_misaligned_ranges) {
  fake().control->alignment = 64;
  {
    Fixture f;
    Error err;
    CHECK_EQ(f.refused({f.range(0, 0, 64), f.range(128, 96, 64)}, err), KVL_INVALID);
    CHECK_CONTAINS(err.message, "range 1:");
    CHECK_CONTAINS(err.message, "multiples of 64");
    CHECK_EQ(f.refused({f.range(0, 0, 65)}, err), KVL_INVALID);
    CHECK_EQ(finish(f.submit({f.range(64, 128, 192)})).status, KVL_OK);
  }
  fake().control->alignment = 48;  // no power of two
  Fixture f;
  Error err;
  CHECK_EQ(f.refused({f.range(64, 0, 48)}, err), KVL_INVALID);
  CHECK_EQ(finish(f.submit({f.range(96, 48, 96)})).status, KVL_OK);
}

TEST(an_empty_batch_completes_at_once) {
  Fixture f;
  for (const auto &ranges : {std::vector<kvl_range>{}, std::vector<kvl_range>{f.range(5, 9, 0), f.range(0, 0, 0)}}) {
    kve_transfer *transfer = f.submit(ranges);
    CHECK_EQ(kve_transfer_done(transfer), 1);
    const kve_result result = finish(transfer);
    CHECK_EQ(result.status, KVL_OK);
    CHECK_EQ(result.bytes, 0);
    CHECK_EQ(result.ranges, 0);
  }
  CHECK_EQ(f.control.submits, 0);
  Error err;
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(f.peer, KVL_PUT, nullptr, 3, 0, 0, 0, &transfer, &err), KVL_INVALID);
  const kvl_range one = f.range(0, 0, 1);  // the count is refused before anything is read
  CHECK_EQ(kve_submit(f.peer, KVL_PUT, &one, uint64_t{1} << 60, 0, 0, 0, &transfer, &err), KVL_NO_RESOURCE);
}

TEST(takes_an_unaligned_array) {
  Fixture f;
  std::vector<char> bytes(sizeof(kvl_range) * 2 + 3);
  const kvl_range ranges[2] = {f.range(0, 0, 8), f.range(100, 100, 8)};
  std::memcpy(bytes.data() + 3, ranges, sizeof ranges);
  Error err;
  kve_transfer *transfer = nullptr;
  void *unaligned = bytes.data() + 3;
  CHECK_EQ(kve_submit(f.peer, KVL_PUT, static_cast<const kvl_range *>(unaligned), 2, 0, 0, 0, &transfer, &err), KVL_OK);
  CHECK_EQ(finish(transfer).ranges, 2);
}

TEST(merges_neighbours_on_both_sides_only) {
  Fixture f;
  const kve_result result = finish(f.submit({f.range(0, 100, 10), f.range(10, 110, 10), f.range(20, 130, 10),
                                             f.range(40, 140, 10), f.range(0, 0, 0), f.range(50, 150, 5)}));
  CHECK_EQ(result.ranges, 3);
  CHECK_EQ(result.bytes, 45);
  const auto &seen = f.control.seen.at(0);
  CHECK_EQ(seen.size(), 3);
  CHECK_EQ(seen[0].length, 20);
  CHECK_EQ(seen[1].length, 10);
  CHECK_EQ(seen[2].length, 15);
  const kve_statistics statistics = f.statistics();
  CHECK_EQ(statistics.ranges_in, 6);
  CHECK_EQ(statistics.ranges_out, 3);
  CHECK_EQ(statistics.put_bytes, 45);
}

namespace {

struct Shape {
  uint64_t alignment, max_ranges, max_range_bytes;
};

// Random batches over many regions against a model that copies range by range. What the provider was given must be
// the same bytes in the same places, in pieces within its limits, and never two pieces that could have been one.
void compare_with_model(const Shape &shape, uint32_t seed) {
  FakeControl &control = *fake().control;
  control.alignment = shape.alignment;
  control.max_ranges = shape.max_ranges;
  control.max_range_bytes = shape.max_range_bytes;
  std::mt19937 random(seed);
  const auto pick = [&random](uint64_t below) { return std::uniform_int_distribution<uint64_t>(0, below - 1)(random); };
  Fixture f;
  constexpr size_t kRegions = 40;
  const uint64_t unit = shape.alignment, units = 256, size = unit * units;
  std::vector<std::vector<char>> locals(kRegions, std::vector<char>(size)), remotes = locals;
  std::vector<uint32_t> mems, rmems;
  for (size_t i = 0; i < kRegions; ++i) {
    for (char &byte : locals[i]) byte = static_cast<char>(pick(256));
    for (char &byte : remotes[i]) byte = static_cast<char>(pick(256));
    mems.push_back(f.open_mem(locals[i]));
    rmems.push_back(Fixture::open_rmem(f.peer, remotes[i]));
  }
  for (int round = 0; round < 60; ++round) {
    control.submit = round % 2 == 0 ? Submit::kInline : Submit::kLater;
    const uint32_t operation = round % 3 == 0 ? KVL_GET : KVL_PUT;
    // Disjoint targets: two ranges that write one byte have no defined order.
    std::vector<std::vector<bool>> written(kRegions, std::vector<bool>(units));
    auto model = operation == KVL_PUT ? remotes : locals;
    std::vector<kvl_range> ranges;
    uint64_t bytes = 0;
    size_t a = pick(kRegions), b = pick(kRegions);
    uint64_t from = 0, to = 0;
    for (uint64_t i = 0, n = pick(200); i < n; ++i) {
      if (pick(3) == 0) a = pick(kRegions), b = pick(kRegions), from = pick(units), to = pick(units);
      const uint64_t length = pick(12);
      if (from + length > units || to + length > units) {
        from = to = 0;
        continue;
      }
      const size_t target = operation == KVL_PUT ? b : a;
      const uint64_t target_at = operation == KVL_PUT ? to : from;
      bool fresh = true;
      for (uint64_t k = 0; k < length; ++k) fresh = fresh && !written[target][target_at + k];
      if (!fresh) continue;
      for (uint64_t k = 0; k < length; ++k) written[target][target_at + k] = true;
      ranges.push_back({mems[a], rmems[b], from * unit, to * unit, length * unit});
      const char *source = operation == KVL_PUT ? locals[a].data() + from * unit : remotes[b].data() + to * unit;
      std::memcpy(model[target].data() + target_at * unit, source, length * unit);
      bytes += length * unit;
      from += length;
      to += length + (pick(5) == 0 ? 1 : 0);
    }
    control.seen.clear();
    const kve_result result = finish(f.submit(ranges, operation));
    CHECK_EQ(result.status, KVL_OK);
    CHECK_EQ(result.bytes, bytes);
    CHECK((operation == KVL_PUT ? remotes : locals) == model);
    uint64_t given = 0, pieces = 0;
    kvl_range last{};
    for (const auto &part : control.seen) {
      CHECK(shape.max_ranges == 0 || part.size() <= shape.max_ranges);
      for (const kvl_range &piece : part) {
        CHECK(piece.length > 0);
        const uint64_t chunk = shape.max_range_bytes - shape.max_range_bytes % unit;
        CHECK(chunk == 0 || piece.length <= chunk);
        const bool adjacent = last.mem == piece.mem && last.rmem == piece.rmem &&
                              last.local_offset + last.length == piece.local_offset &&
                              last.remote_offset + last.length == piece.remote_offset;
        CHECK(!adjacent || (chunk != 0 && last.length == chunk));
        last = piece;
        given += piece.length;
        ++pieces;
      }
    }
    CHECK_EQ(given, bytes);
    CHECK_EQ(pieces, result.ranges);
  }
}

}  // namespace

TEST(random_batches_match_the_model) { compare_with_model({1, 0, 0}, 1); }
TEST(random_batches_match_the_model_aligned) { compare_with_model({16, 0, 0}, 2); }
TEST(random_batches_match_the_model_split_by_count) { compare_with_model({1, 7, 0}, 3); }
TEST(random_batches_match_the_model_split_by_bytes) { compare_with_model({8, 0, 36}, 4); }
TEST(random_batches_match_the_model_split_by_both) { compare_with_model({4, 3, 8}, 5); }
