// Ranges to descriptors: bounds and access in one pass, coalescing, batches, and the blobs that peers send.
#include "ascend/regions.h"

#include <cstring>
#include <random>

#include "native/host/harness.h"

using namespace kvlink::ascend;

namespace {

std::shared_ptr<Region> local(uint32_t handle, uint64_t address, uint64_t length) {
  auto region = std::make_shared<Region>();
  region->handle = handle;
  region->address = address;
  region->length = length;
  region->kind = KVL_MEMORY_DEVICE;
  region->sequence = handle;
  return region;
}

std::shared_ptr<RemoteRegion> remote(uint32_t handle, uint64_t address, uint64_t length, uint32_t access) {
  auto region = std::make_shared<RemoteRegion>();
  region->handle = handle;
  region->address = address;
  region->length = length;
  region->access = access;
  return region;
}

void test_handles() {
  RegionTable table;
  const uint32_t generation = 1u << KVL_HANDLE_INDEX_BITS;
  CHECK(table.insert(local(5, 0x1000, 16)));
  CHECK(!table.insert(local(5 + generation, 0x2000, 16)));
  {
    RegionTable::Reader reader(table);
    CHECK(reader.find(5)->address == 0x1000);
    CHECK(reader.find(5 + generation) == nullptr);
    CHECK(reader.find(900) == nullptr);
    CHECK(reader.find(5) != nullptr);
  }
  CHECK(table.erase(5 + generation) == nullptr);
  CHECK(table.erase(5) != nullptr);
  CHECK(table.get(5) == nullptr);
  CHECK(table.insert(local(5 + generation, 0x2000, 16)));
}

void test_plan() {
  RegionTable locals;
  RemoteTable remotes;
  locals.insert(local(1, 0x1000, 100));
  locals.insert(local(2, 0x9000, 100));
  locals.get(2)->staged = true;
  remotes.insert(remote(1, 0x5000, 100, KVL_ACCESS_READ));
  const auto plan = [&](uint32_t operation, const kvl_range &range, RangePlan *out) {
    *out = {};
    return plan_ranges(locals, remotes, operation, &range, 1, out);
  };
  RangePlan got;
  CHECK(plan(KVL_GET, {1, 1, 0, 0, 100}, &got).ok());
  CHECK(got.bytes == 100 && got.pieces == 1 && !got.staged && got.newest_local == 1);
  CHECK(plan(KVL_GET, {2, 1, 50, 50, 50}, &got).ok());
  CHECK(got.staged && got.staged_local && !got.staged_remote);
  CHECK(plan(KVL_GET, {1, 1, 100, 100, 0}, &got).ok() && got.pieces == 0);
  CHECK(plan(KVL_PUT, {1, 1, 0, 0, 1}, &got).status == KVL_DENIED);
  const kvl_range bad[] = {{1, 1, 0, 0, 101},
                           {1, 1, 1, 0, 100},
                           {1, 1, 0, 1, 100},
                           {1, 1, 101, 0, 0},
                           {3, 1, 0, 0, 1},
                           {1, 9, 0, 0, 1},
                           {1, 1, 50, 0, UINT64_MAX},
                           {1, 1, 0, 50, UINT64_MAX - 49},
                           {1 + (1u << KVL_HANDLE_INDEX_BITS), 1, 0, 0, 1}};
  for (const kvl_range &range : bad) CHECK(plan(KVL_GET, range, &got).status == KVL_INVALID);
}

// Whatever the ranges and the batch size, the descriptors cover the same bytes in the same order, and no two that
// follow each other could be one.
void test_cursor() {
  std::mt19937 random(7);
  RegionTable locals;
  RemoteTable remotes;
  for (uint32_t i = 0; i < 4; ++i) {
    locals.insert(local(i, 0x100000 + i * 0x1000, 0x1000));
    remotes.insert(remote(i, 0x900000 + i * 0x1000, 0x1000, 3));
  }
  for (int round = 0; round < 300; ++round) {
    std::vector<kvl_range> ranges;
    for (size_t n = random() % 40; n > 0; --n) {
      kvl_range range{static_cast<uint32_t>(random() % 4), static_cast<uint32_t>(random() % 4), random() % 2000,
                      random() % 2000, random() % 3 == 0 ? 0 : random() % 64};
      if (!ranges.empty() && random() % 2 == 0) {
        const kvl_range &last = ranges.back();
        range = {last.mem, last.rmem, last.local_offset + last.length, last.remote_offset + last.length, range.length};
      }
      ranges.push_back(range);
    }
    std::vector<Descriptor> all;
    RangeCursor cursor(ranges.data(), ranges.size());
    const uint64_t most = 1 + random() % 7;
    RegionTable::Reader local_reader(locals);
    RemoteTable::Reader remote_reader(remotes);
    uint64_t gone = 0;
    for (;;) {
      const uint64_t before = all.size();
      const uint64_t count =
          cursor.next(local_reader, remote_reader, most, [&](const Descriptor &d) { all.push_back(d); }, &gone);
      CHECK_EQ(gone, UINT64_MAX);
      CHECK_EQ(all.size() - before, count);
      CHECK(count <= most);
      if (count == 0) break;
      CHECK(count == most || cursor.done());
    }
    CHECK(cursor.done());
    size_t at = 0;
    uint64_t inside = 0;
    for (const kvl_range &range : ranges) {
      if (range.length == 0) continue;
      if (at < all.size() && inside == all[at].length) {
        ++at;
        inside = 0;
      }
      CHECK(at < all.size());
      CHECK_EQ(all[at].local + inside, 0x100000 + range.mem * 0x1000 + range.local_offset);
      CHECK_EQ(all[at].remote + inside, 0x900000 + range.rmem * 0x1000 + range.remote_offset);
      inside += range.length;
      CHECK(inside <= all[at].length);
    }
    CHECK(all.empty() ? inside == 0 : at + 1 == all.size() && inside == all[at].length);
  }
}

// Adjoining regions are not joined: a vendor's descriptor must lie in one of them.
void test_cursor_stays_inside_regions() {
  RegionTable locals;
  RemoteTable remotes;
  locals.insert(local(1, 0x1000, 0x100));
  locals.insert(local(2, 0x1100, 0x100));
  remotes.insert(remote(1, 0x5000, 0x200, 3));
  const kvl_range ranges[] = {{1, 1, 0, 0, 0x100}, {2, 1, 0, 0x100, 0x100}, {2, 7, 0, 0, 1}};
  RegionTable::Reader local_reader(locals);
  RemoteTable::Reader remote_reader(remotes);
  RangeCursor cursor(ranges, 3);
  std::vector<Descriptor> all;
  uint64_t gone;
  CHECK_EQ(
      cursor.next(local_reader, remote_reader, 8, [&](const Descriptor &d) { all.push_back(d); }, &gone), uint64_t{2});
  CHECK_EQ(gone, uint64_t{2});  // the third names a region that is not open
}

void test_blobs() {
  Region region;
  region.handle = 77;
  region.access = 3;
  region.kind = KVL_MEMORY_HOST;
  region.address = 0x1234;
  region.length = 99;
  region.staged = true;
  region.sequence = 4;
  const RegionBlob blob = make_region_blob(region);
  RegionBlob got;
  CHECK(parse_region_blob(&blob, sizeof blob, &got).ok());
  CHECK(std::memcmp(&blob, &got, sizeof blob) == 0);
  for (uint64_t length = 0; length < sizeof blob; ++length) CHECK(!parse_region_blob(&blob, length, &got).ok());
  CHECK(!parse_region_blob(&blob, sizeof blob + 1, &got).ok());
  CHECK(!parse_region_blob(nullptr, sizeof blob, &got).ok());
  const auto broken = [&](auto change) {
    RegionBlob bad = blob;
    change(bad);
    CHECK(parse_region_blob(&bad, sizeof bad, &got).status == KVL_INVALID);
  };
  broken([](RegionBlob &b) { b.magic ^= 1; });
  broken([](RegionBlob &b) { ++b.version; });
  broken([](RegionBlob &b) { b.length = 0; });
  broken([](RegionBlob &b) { b.address = 0; });
  broken([](RegionBlob &b) { b.address = UINT64_MAX - 5; });
  broken([](RegionBlob &b) { b.access = 4; });
  broken([](RegionBlob &b) { b.kind = 2; });
  broken([](RegionBlob &b) { b.staged = 2; });
  uint64_t room = 3;
  char buffer[64];
  CHECK(export_bytes(&blob, sizeof blob, buffer, &room, "mem_export").status == KVL_NO_RESOURCE);
  CHECK_EQ(room, uint64_t{sizeof blob});
  CHECK(export_bytes(&blob, sizeof blob, buffer, &room, "mem_export").ok());
}

}  // namespace

int main() {
  test_handles();
  test_plan();
  test_cursor();
  test_cursor_stays_inside_regions();
  test_blobs();
  std::puts("regions: passed");
  return 0;
}
