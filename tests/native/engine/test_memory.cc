// Regions: registration, allocation, copies, and closing one that transfers still use.
#include "harness.h"

TEST(checks_what_is_registered) {
  fake().control->memory_alignment = 16;
  Fixture f;
  Error err;
  uint32_t handle = 0;
  alignas(16) static char memory[256];
  kvl_mem_desc good = Fixture::describe(f.local);
  good.address = reinterpret_cast<uint64_t>(memory);
  good.length = sizeof memory;
  const auto refuse = [&](auto change, kvl_status expected, const char *part) {
    kvl_mem_desc desc = good;
    change(desc);
    CHECK_EQ(kve_mem_open(f.channel, &desc, &handle, &err), expected);
    CHECK_CONTAINS(err.message, part);
  };
  refuse([](kvl_mem_desc &d) { d.address = 0; }, KVL_INVALID, "address 0x0");
  refuse([](kvl_mem_desc &d) { d.length = 0; }, KVL_INVALID, "0 bytes");
  refuse([](kvl_mem_desc &d) { d.length = UINT64_MAX; }, KVL_INVALID, "overflows");
  refuse([](kvl_mem_desc &d) { d.access = 4; }, KVL_INVALID, "access 4");
  refuse([](kvl_mem_desc &d) { d.kind = KVL_MEMORY_DEVICE; }, KVL_UNSUPPORTED, "kind 1");
  refuse([](kvl_mem_desc &d) { d.kind = 64; }, KVL_UNSUPPORTED, "kind 64");
  refuse([](kvl_mem_desc &d) { d.address += 8; }, KVL_INVALID, "multiples of 16");
  refuse([](kvl_mem_desc &d) { d.length -= 8; }, KVL_INVALID, "multiples of 16");
  refuse([](kvl_mem_desc &d) { d.struct_size = 8; }, KVL_INVALID, "struct_size");
  f.control.mem_open_status = KVL_NO_RESOURCE;
  refuse([](kvl_mem_desc &) {}, KVL_NO_RESOURCE, "scripted failure");
  f.control.mem_open_status = KVL_OK;
  CHECK_EQ(kve_mem_open(f.channel, &good, &handle, &err), KVL_OK);
  CHECK_EQ(kve_mem_open(f.channel, nullptr, &handle, &err), KVL_INVALID);
}

TEST(exports_in_two_calls) {
  Fixture f;
  Error err;
  uint64_t length = 0;
  CHECK_EQ(kve_mem_export(f.channel, f.mem, nullptr, &length, &err), KVL_NO_RESOURCE);
  CHECK_EQ(length, 16);
  char buffer[16];
  CHECK_EQ(kve_mem_export(f.channel, f.mem, buffer, &length, &err), KVL_OK);
  CHECK_EQ(kve_mem_export(f.channel, f.mem + 1, buffer, &length, &err), KVL_INVALID);
  length = 0;
  CHECK_EQ(kve_peer_describe(f.peer, nullptr, &length, &err), KVL_NO_RESOURCE);
  CHECK_EQ(length, 4);
  CHECK_EQ(kve_peer_describe(f.peer, buffer, &length, &err), KVL_OK);
}

TEST(allocates_and_copies) {
  Fixture f;
  Error err;
  uint64_t address = 0;
  CHECK_EQ(kve_mem_alloc(f.channel, 0, 0, &address, &err), KVL_INVALID);
  CHECK_EQ(kve_mem_alloc(f.channel, 0, 4096, &address, &err), KVL_OK);
  kve_mem_free(f.channel, address + 1);  // not ours: ignored
  kve_mem_free(f.channel, address);
  kve_mem_free(f.channel, address);
  CHECK_EQ(f.control.mem_frees, 1);
  CHECK_EQ(kve_mem_alloc(f.channel, 0, 4096, &address, &err), KVL_OK);  // left to close
  char text[] = "hello";
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, 10, text, 5, 1, &err), KVL_OK);
  CHECK_EQ(f.local[10], 'h');
  char back[6] = {};
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, 10, back, 5, 0, &err), KVL_OK);
  CHECK_CONTAINS(back, "hello");
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, 65533, text, 5, 1, &err), KVL_INVALID);
  CHECK_CONTAINS(err.message, "offset 65533 + length 5");
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, UINT64_MAX, text, 5, 1, &err), KVL_INVALID);
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, 0, nullptr, 5, 1, &err), KVL_INVALID);
  CHECK_EQ(kve_mem_copy(f.channel, f.mem, 0, nullptr, 0, 1, &err), KVL_OK);
  kvl_stat stat{};
  uint32_t count = 1;
  CHECK_EQ(kve_channel_provider_stats(f.channel, &stat, &count, &err), KVL_OK);
  CHECK_CONTAINS(stat.name, "submits");
}

TEST(closing_cancels_what_uses_it) {
  Fixture f;
  f.control.submit = Submit::kHold;
  std::vector<char> other(4096);
  const uint32_t other_mem = f.open_mem(other);
  kve_transfer *uses = f.submit({f.range(0, 0, 64)});
  kve_transfer *uses_other = f.submit({{other_mem, f.rmem, 0, 0, 64}});
  Error err;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 10000, &err), KVL_OK);
  const kve_result result = finish(uses);
  CHECK_EQ(result.status, KVL_CANCELLED);
  CHECK_CONTAINS(result.site, "region_close");
  CHECK_CONTAINS(result.message, "one of its regions is being closed");
  CHECK_EQ(kve_transfer_done(uses_other), 0);
  f.api.release_held(KVL_OK);
  CHECK_EQ(finish(uses_other).status, KVL_OK);
}

TEST(closing_times_out_while_the_provider_still_writes) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  Error err;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 50, &err), KVL_TIMEOUT);
  CHECK_CONTAINS(err.message, "still used by 1 transfers after 50 ms");
  CHECK_EQ(f.control.mem_closes, 0);
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_DENIED);
  CHECK_CONTAINS(err.message, "is being closed");
  CHECK_EQ(kve_mem_export(f.channel, f.mem, nullptr, nullptr, &err), KVL_INVALID);
  kve_peer_close(f.peer, KVL_LINK_DOWN, "needed its memory", 1000);
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 10000, &err), KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_CANCELLED);  // the first reason: its region was closed
}

TEST(two_closers_of_one_region) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  std::thread first([&] {
    Error mine;
    CHECK_EQ(kve_mem_close(f.channel, f.mem, 20000, &mine), KVL_OK);
  });
  CHECK(eventually([&] { return f.control.cancels > 0; }));
  Error err;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 0, &err), KVL_BUSY);
  f.api.release_held(KVL_OK);
  first.join();
  CHECK_EQ(finish(transfer).status, KVL_OK);
  CHECK_EQ(f.control.mem_closes, 1);
}

TEST(a_busy_provider_keeps_the_region) {
  Fixture f;
  f.control.mem_close_status = KVL_BUSY;
  Error err;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 100, &err), KVL_BUSY);
  f.control.mem_close_status = KVL_OK;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 100, &err), KVL_OK);
}

TEST(withdrawing_a_remote_region) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  Error err;
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 10000, &err), KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_CANCELLED);
  CHECK_EQ(f.control.rmem_closes, 1);
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_INVALID);
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 0, &err), KVL_INVALID);
  f.control.rmem_open_status = KVL_DENIED;
  const uint64_t blob[2] = {1, 1};
  uint32_t rmem = 0;
  CHECK_EQ(kve_rmem_open(f.peer, blob, sizeof blob, 1, 3, 10, &rmem, &err), KVL_DENIED);
  CHECK_EQ(kve_rmem_open(f.peer, blob, sizeof blob, 0, 3, 10, &rmem, &err), KVL_INVALID);
  CHECK_EQ(kve_rmem_open(f.peer, blob, sizeof blob, 1, 8, 10, &rmem, &err), KVL_INVALID);
  f.control.rmem_open_status = KVL_OK;
}

TEST(withdrawing_waits_for_a_lost_link_to_close) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  f.control.hang_link_close = true;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  Error err;
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 50, &err), KVL_TIMEOUT);
  kve_peer_close(f.peer, KVL_LINK_DOWN, "lost", 50);
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 50, &err), KVL_TIMEOUT);
  CHECK_CONTAINS(err.message, "still being closed");
  f.control.hang_link_close = false;
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 10000, &err), KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_CANCELLED);  // the first reason: its region was closed
}

TEST(registering_ten_thousand_times_does_not_grow) {
  Fixture f;
  Error err;
  uint32_t highest = 0;
  for (int i = 0; i < 10000; ++i) {
    const uint32_t handle = f.open_mem(f.local);
    highest = std::max(highest, handle & ((1u << KVL_HANDLE_INDEX_BITS) - 1));
    CHECK_EQ(kve_mem_close(f.channel, handle, 1000, &err), KVL_OK);
  }
  CHECK(highest < 100);
}
