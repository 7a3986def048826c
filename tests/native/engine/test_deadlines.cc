// Deadlines: marked, cancelled, and when that does not help the link goes; nothing stays "in progress" for ever.
#include "harness.h"

TEST(a_deadline_cancels) {
  Fixture f;
  f.control.submit = Submit::kHold;
  const auto start = Clock::now();
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)}, KVL_PUT, 100);
  const kve_result result = finish(transfer);
  CHECK(ms_since(start) >= 100);
  CHECK_EQ(result.status, KVL_TIMEOUT);
  CHECK_CONTAINS(result.message, "the put passed its deadline of 100 ms with 32 of 64 bytes done");
  CHECK_CONTAINS(result.message, "peer 'peer-1'");
  CHECK_EQ(f.statistics().timed_out, 1);
  CHECK_EQ(f.control.link_closes, 0);
  f.control.submit = Submit::kInline;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_OK);  // the peer lives
}

TEST(the_channels_default_deadline) {
  Fixture f(80);
  f.control.submit = Submit::kHold;
  const kve_result result = finish(f.submit({f.range(0, 0, 64)}));
  CHECK_EQ(result.status, KVL_TIMEOUT);
  CHECK_CONTAINS(result.message, "80 ms");
}

TEST(deadlines_in_any_order) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *slow = f.submit({f.range(0, 0, 8)}, KVL_PUT, 400);
  kve_transfer *fast = f.submit({f.range(0, 0, 8)}, KVL_PUT, 50);
  kve_transfer *none = f.submit({f.range(0, 0, 8)});
  const auto start = Clock::now();
  CHECK_EQ(finish(fast).status, KVL_TIMEOUT);
  CHECK(ms_since(start) < 380);
  CHECK_EQ(finish(slow).status, KVL_TIMEOUT);
  CHECK_EQ(kve_transfer_done(none), 0);
  f.api.release_held(KVL_OK);
  CHECK_EQ(finish(none).status, KVL_OK);
}

TEST(a_deadline_before_submission_ends_a_queued_transfer) {
  Fixture f;
  f.control.again = 1 << 30;
  const kve_result result = finish(f.submit({f.range(0, 0, 64)}, KVL_GET, 60));
  CHECK_EQ(result.status, KVL_TIMEOUT);
  CHECK_CONTAINS(result.message, "the get passed its deadline of 60 ms with 0 of 64 bytes done");
  f.control.again = 0;
}

TEST(a_true_completion_within_the_grace_wins) {
  Fixture f(30000, 20000);
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)}, KVL_PUT, 50);
  CHECK(eventually([&] { return f.control.cancels > 0; }));
  CHECK_EQ(kve_transfer_done(transfer), 0);
  f.api.release_held(KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_OK);
  CHECK_EQ(f.control.link_closes, 0);
}

TEST(a_deaf_provider_loses_the_link) {
  Fixture f(30000, 100);
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *late = f.submit({f.range(0, 0, 64)}, KVL_PUT, 50);
  kve_transfer *bystander = f.submit({f.range(0, 0, 64)});
  const kve_result result = finish(late);
  CHECK_EQ(result.status, KVL_TIMEOUT);
  const kve_result other = finish(bystander);
  CHECK_EQ(other.status, KVL_LINK_DOWN);
  CHECK_CONTAINS(other.message, "did not stop within 100 ms after its deadline of 50 ms");
  CHECK(eventually([&] { return f.control.link_closes == 1; }));
  Error err;
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_LINK_DOWN);
  CHECK_CONTAINS(err.message, "so the link was closed");
  CHECK_EQ(kve_peer_check(f.peer, &err), KVL_LINK_DOWN);
}

TEST(a_provider_without_cancel_gets_the_grace_too) {
  fake().control->caps = fake().control->caps & ~static_cast<uint64_t>(KVL_CAP_CANCEL);
  Fixture f(30000, 100);
  f.control.submit = Submit::kHold;
  const auto start = Clock::now();
  CHECK_EQ(finish(f.submit({f.range(0, 0, 64)}, KVL_PUT, 50)).status, KVL_TIMEOUT);
  CHECK(ms_since(start) >= 150);
  CHECK_EQ(f.control.cancels, 0);
}

TEST(a_hanging_link_close_stops_nobody_else) {
  Fixture f(30000, 50);
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  f.control.hang_link_close = true;
  kve_peer *stuck = f.open_peer(KVL_ROLE_INITIATOR, "stuck");
  const uint32_t rmem = Fixture::open_rmem(stuck, f.remote);
  const kvl_range range{f.mem, rmem, 0, 0, 64};
  Error err;
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(stuck, KVL_PUT, &range, 1, 0, 50, 0, &transfer, &err), KVL_OK);
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  f.control.submit = Submit::kLater;
  for (int i = 0; i < 20; ++i) CHECK_EQ(finish(f.submit({f.range(0, 0, 1)})).status, KVL_OK);
  // It ends all the same, and says so; but its region stays in use, because the provider may still write there.
  CHECK_EQ(finish(transfer).status, KVL_TIMEOUT);
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 50, &err), KVL_TIMEOUT);
  CHECK_CONTAINS(err.message, "still used by 1 transfers");
  f.control.hang_link_close = false;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 10000, &err), KVL_OK);
  kve_peer_release(stuck);
}

TEST(a_completion_lost_by_the_provider_does_not_hang_the_transfer) {
  Fixture f(30000, 50);
  f.control.submit = Submit::kHold;
  f.control.lose_on_close = true;  // link_close forgets its submits
  f.control.honour_cancel = false;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 64)}, KVL_PUT, 50)).status, KVL_TIMEOUT);
  Error err;
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 10000, &err), KVL_OK);  // link_close returned: nothing touches it
}
