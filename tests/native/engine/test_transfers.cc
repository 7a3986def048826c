// A transfer's life: inline, later, AGAIN, failures, splitting, cancel, results, notifications.
#include <poll.h>

#include <algorithm>
#include <set>

#include "harness.h"

namespace {

bool readable(int fd, int timeout_ms) {
  pollfd entry{fd, POLLIN, 0};
  return poll(&entry, 1, timeout_ms) == 1;
}

std::vector<uint64_t> drain(kve_channel *channel, uint32_t capacity = 64) {
  std::vector<uint64_t> ids(capacity);
  ids.resize(kve_channel_drain(channel, ids.data(), capacity));
  return ids;
}

// Gaps on both sides, so that nothing merges.
std::vector<kvl_range> scattered(const Fixture &f, uint64_t count) {
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < count; ++i) ranges.push_back(f.range(i * 32, i * 48, 16));
  return ranges;
}

}  // namespace

TEST(done_inline_is_done_on_return) {
  Fixture f;
  f.local[7] = 'x';
  kve_transfer *transfer = f.submit({f.range(7, 9, 1)});
  CHECK_EQ(kve_transfer_done(transfer), 1);
  CHECK_EQ(f.remote[9], 'x');
  const kve_result result = result_of(transfer);
  CHECK_EQ(result.status, KVL_OK);
  CHECK_EQ(result.path, 1);
  CHECK(result.duration_ns > 0);
  CHECK_EQ(f.control.wakes, 0);  // no thread was disturbed
  kve_transfer_release(transfer);
}

TEST(a_later_completion_ends_it) {
  Fixture f;
  f.control.submit = Submit::kLater;
  f.control.hang_wait = false;
  for (int i = 0; i < 200; ++i) {
    f.remote[0] = static_cast<char>(i);
    CHECK_EQ(finish(f.submit({f.range(0, 0, 1)}, KVL_GET)).status, KVL_OK);
    CHECK_EQ(f.local[0], static_cast<char>(i));
  }
  CHECK_EQ(f.statistics().succeeded, 200);
  CHECK_EQ(f.statistics().get_bytes, 200);
}

TEST(the_engine_thread_needs_no_waiter) {
  Fixture f;
  f.control.submit = Submit::kLater;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  CHECK(eventually([&] { return kve_transfer_done(transfer) == 1; }));
  kve_transfer_release(transfer);
}

TEST(a_waiter_makes_progress_while_the_engine_thread_sleeps) {
  Fixture f;
  f.control.submit = Submit::kLater;
  f.control.deaf_wait = true;  // the engine thread hears of no work
  CHECK(eventually([&] { return f.control.waits > 0; }));
  const auto start = Clock::now();
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_OK);
  CHECK(ms_since(start) < 5000);
}

TEST(wait_honours_its_timeout) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  CHECK_EQ(kve_transfer_wait(transfer, 0), 0);
  const auto start = Clock::now();
  CHECK_EQ(kve_transfer_wait(transfer, 50), 0);
  CHECK(ms_since(start) >= 50);
  CHECK_EQ(result_of(transfer).status, KVL_AGAIN);
  std::thread releaser([&] { f.api.release_held(KVL_OK); });
  CHECK_EQ(finish(transfer).status, KVL_OK);
  releaser.join();
}

TEST(again_is_retried_in_order) {
  Fixture f;
  f.control.again = 25;
  std::vector<kve_transfer *> transfers;
  for (uint64_t i = 0; i < 10; ++i) transfers.push_back(f.submit({f.range(i * 100, 0, 10 + i)}));
  for (kve_transfer *transfer : transfers) CHECK_EQ(finish(transfer).status, KVL_OK);
  CHECK_EQ(f.control.seen.size(), 10);
  for (uint64_t i = 0; i < 10; ++i) CHECK_EQ(f.control.seen[i][0].length, 10 + i);
  CHECK_EQ(f.control.submits, 35);
}

TEST(again_can_be_cancelled) {
  Fixture f;
  f.control.again = 1 << 30;
  kve_transfer *first = f.submit({f.range(0, 0, 1)});
  kve_transfer *second = f.submit({f.range(0, 0, 2)});
  kve_transfer_cancel(first);
  CHECK_EQ(kve_transfer_wait(first, 10000), 1);
  CHECK_EQ(finish(first).status, KVL_CANCELLED);
  f.control.again = 0;
  CHECK_EQ(finish(second).status, KVL_OK);
  CHECK_EQ(f.control.seen.size(), 1);
}

TEST(large_batches_are_split_and_counted_once) {
  fake().control->max_ranges = 10;
  for (const Submit how : {Submit::kInline, Submit::kLater, Submit::kHold}) {
    Fixture f;
    f.control.seen.clear();
    f.control.submit = how;
    kve_transfer *transfer = f.submit(scattered(f, 105));
    if (how == Submit::kHold) CHECK_EQ(f.api.release_held(KVL_OK), 11);
    const kve_result result = finish(transfer);
    CHECK_EQ(result.status, KVL_OK);
    CHECK_EQ(result.ranges, 105);
    CHECK_EQ(result.bytes, 105 * 16);
    CHECK_EQ(f.control.seen.size(), 11);
    CHECK_EQ(f.statistics().succeeded, 1);
  }
}

TEST(again_between_the_parts_of_a_split_batch) {
  fake().control->max_ranges = 4;
  Fixture f;
  f.control.submit = Submit::kLater;
  kve_transfer *first = nullptr;
  for (int i = 0; i < 5; ++i) {
    f.control.again = i;
    first = f.submit(scattered(f, 30));
    CHECK_EQ(finish(first).status, KVL_OK);
  }
  uint64_t ranges = 0;
  for (const auto &part : f.control.seen) ranges += part.size();
  CHECK_EQ(ranges, 150);
}

TEST(one_failed_part_fails_the_transfer_once) {
  fake().control->max_ranges = 10;
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit(scattered(f, 40));
  CHECK_EQ(f.api.held(), 4);
  CHECK(f.api.end_held(f.api.last_tag(), KVL_REMOTE));  // one part fails: the others are cancelled
  const kve_result result = finish(transfer);
  CHECK_EQ(result.status, KVL_REMOTE);
  CHECK_CONTAINS(result.site, "fake_move");
  CHECK_EQ(result.vendor_code, 77);
  CHECK_CONTAINS(result.message, "scripted completion failure");
  CHECK_EQ(f.statistics().failed, 1);
  CHECK(f.control.cancels > 0);
}

TEST(provider_failures_end_the_transfer) {
  Fixture f;
  f.control.submit_status = KVL_NO_RESOURCE;
  kve_result result = finish(f.submit({f.range(0, 0, 1)}));
  CHECK_EQ(result.status, KVL_NO_RESOURCE);
  CHECK_CONTAINS(result.message, "scripted failure");
  f.control.silent_failures = true;
  result = finish(f.submit({f.range(0, 0, 1)}));
  CHECK_CONTAINS(result.message, "submit failed with NO_RESOURCE and gave no reason");
  f.control.submit_status = -5;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_INTERNAL);
  f.control.submit_status = KVL_OK;
  f.control.completion = KVL_REMOTE;
  result = finish(f.submit({f.range(0, 0, 1)}));
  CHECK_EQ(result.status, KVL_REMOTE);
  CHECK_CONTAINS(result.message, "REMOTE");
  f.control.submit = Submit::kLater;
  f.control.completion = 1234;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_INTERNAL);
  f.control.completion = KVL_OK;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_OK);  // the peer still works
}

TEST(unknown_and_repeated_completions_are_ignored) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  const uint64_t tag = f.api.last_tag();
  for (const uint64_t bogus : {uint64_t{0}, tag + 1, tag + (1u << 24), UINT64_MAX, uint64_t{1} << 63}) {
    f.api.inject(bogus, KVL_REMOTE);
  }
  CHECK_EQ(kve_transfer_wait(transfer, 50), 0);
  f.api.release_held(KVL_OK);
  f.api.inject(tag, KVL_REMOTE);
  CHECK_EQ(kve_transfer_wait(transfer, 10000), 1);
  f.api.inject(tag, KVL_REMOTE);
  f.control.submit = Submit::kLater;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_OK);
  CHECK_EQ(f.statistics().succeeded, 2);
}

TEST(cancel_stops_a_transfer) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  kve_transfer_cancel(transfer);
  kve_transfer_cancel(transfer);
  const kve_result result = finish(transfer);
  CHECK_EQ(result.status, KVL_CANCELLED);
  CHECK_CONTAINS(result.message, "cancelled with 32 of 64 bytes done (peer 'peer-1')");
  CHECK_EQ(f.statistics().cancelled, 1);
}

TEST(cancel_that_comes_too_late_changes_nothing) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  kve_transfer_cancel(transfer);
  CHECK_EQ(kve_transfer_wait(transfer, 20), 0);
  f.api.release_held(KVL_OK);
  CHECK_EQ(kve_transfer_wait(transfer, 10000), 1);
  kve_transfer_cancel(transfer);
  CHECK_EQ(finish(transfer).status, KVL_OK);  // its true status
}

TEST(released_in_flight_goes_on) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.local[0] = 'q';
  kve_transfer_release(f.submit({f.range(0, 0, 1)}));
  CHECK_EQ(f.statistics().in_flight, 1);
  f.api.release_held(KVL_OK);
  CHECK(eventually([&] { return f.statistics().in_flight == 0; }));
  CHECK_EQ(f.remote[0], 'q');
}

TEST(notifications_come_once_each) {
  Fixture f;
  const int fd = kve_channel_event_fd(f.channel);
  CHECK(!readable(fd, 0));
  kve_transfer *quiet = f.submit({f.range(0, 0, 1)});
  CHECK(!readable(fd, 0));
  kve_transfer *inline_one = f.submit({f.range(0, 0, 1)}, KVL_PUT, 0, KVE_NOTIFY);
  CHECK(readable(fd, 0));
  kve_transfer_notify(inline_one);  // again: still one
  CHECK_EQ(kve_channel_drain(f.channel, nullptr, 0), 0);
  auto ids = drain(f.channel);
  CHECK_EQ(ids.size(), 1);
  CHECK_EQ(ids[0], kve_transfer_id(inline_one));
  CHECK(!readable(fd, 0));
  kve_transfer_notify(quiet);  // has finished already
  CHECK(readable(fd, 0));
  ids = drain(f.channel);
  CHECK_EQ(ids.size(), 1);
  CHECK_EQ(ids[0], kve_transfer_id(quiet));
  kve_transfer_release(quiet);
  kve_transfer_release(inline_one);

  f.control.submit = Submit::kHold;
  kve_transfer *asked_later = f.submit({f.range(0, 0, 1)});
  kve_transfer_notify(asked_later);
  CHECK(!readable(fd, 0));
  f.api.release_held(KVL_OK);
  CHECK(readable(fd, 10000));
  ids = drain(f.channel);
  CHECK_EQ(ids.size(), 1);
  CHECK_EQ(kve_transfer_done(asked_later), 1);
  kve_transfer_release(asked_later);
}

TEST(a_small_drain_leaves_the_descriptor_readable) {
  Fixture f;
  const int fd = kve_channel_event_fd(f.channel);
  std::set<uint64_t> expected, got;
  for (int i = 0; i < 10; ++i) {
    kve_transfer *transfer = f.submit({f.range(0, 0, 1)}, KVL_PUT, 0, KVE_NOTIFY);
    expected.insert(kve_transfer_id(transfer));
    kve_transfer_release(transfer);  // its id is still given
  }
  while (got.size() < 10) {
    CHECK(readable(fd, 0));
    const auto ids = drain(f.channel, 3);
    CHECK(!ids.empty());
    for (const uint64_t id : ids) CHECK(got.insert(id).second);
  }
  CHECK(got == expected);
  CHECK(!readable(fd, 0));
}

TEST(results_fit_the_readers_struct) {
  Fixture f;
  kve_transfer *transfer = f.submit({f.range(0, 0, 5)});
  kve_result result;
  std::memset(&result, 0x5a, sizeof result);
  result.struct_size = offsetof(kve_result, vendor_code);
  CHECK_EQ(kve_transfer_result(transfer, &result), KVL_OK);
  CHECK_EQ(result.status, KVL_OK);
  CHECK_EQ(result.struct_size, offsetof(kve_result, vendor_code));
  CHECK_EQ(result.bytes, 0x5a5a5a5a5a5a5a5a);  // beyond its size: untouched
  CHECK_EQ(kve_transfer_result(nullptr, &result), KVL_INVALID);
  kve_transfer_release(transfer);
}
