// Peers: connecting, losing a link, closing, imported regions.
#include "harness.h"

TEST(a_lost_link_fails_the_rest_at_once) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *first = f.submit({f.range(0, 0, 64)});
  const uint64_t tag = f.api.last_tag();
  kve_transfer *second = f.submit({f.range(0, 0, 64)});
  CHECK(f.api.end_held(tag, KVL_LINK_DOWN));
  kve_result result = finish(first);
  CHECK_EQ(result.status, KVL_LINK_DOWN);
  CHECK_CONTAINS(result.message, "scripted completion failure");
  result = finish(second);
  CHECK_EQ(result.status, KVL_LINK_DOWN);
  CHECK_CONTAINS(result.message, "scripted completion failure");
  Error err;
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_LINK_DOWN);
  CHECK_EQ(err.vendor_code, 77);
  CHECK(eventually([&] { return f.control.link_closes == 1; }));
  CHECK_EQ(f.statistics().peers, 0);
}

TEST(a_refused_submit_can_lose_the_link_too) {
  Fixture f;
  f.control.submit_status = KVL_LINK_DOWN;
  CHECK_EQ(finish(f.submit({f.range(0, 0, 64)})).status, KVL_LINK_DOWN);
  Error err;
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_LINK_DOWN);
}

TEST(closing_ends_transfers_with_the_given_reason) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.max_ranges = 0;
  kve_transfer *flying = f.submit({f.range(0, 0, 64)});
  f.control.again = 1 << 30;
  kve_transfer *queued = f.submit({f.range(0, 0, 64)});
  kve_peer_close(f.peer, KVL_LINK_DOWN, "the control connection was cut", 1000);
  for (kve_transfer *transfer : {flying, queued}) {
    CHECK_EQ(kve_transfer_done(transfer), 1);  // close waited for them
    const kve_result result = finish(transfer);
    CHECK_EQ(result.status, KVL_LINK_DOWN);
    CHECK_CONTAINS(result.message, "the control connection was cut");
  }
  CHECK_EQ(f.control.link_closes, 1);
  kve_peer_close(f.peer, KVL_TIMEOUT, "again", 1000);
  CHECK_EQ(f.control.link_closes, 1);
  Error err;
  CHECK_EQ(kve_peer_check(f.peer, &err), KVL_LINK_DOWN);
  CHECK_CONTAINS(err.message, "the control connection was cut");  // the first reason stays
  uint64_t length = 0;
  CHECK_EQ(kve_peer_describe(f.peer, nullptr, &length, &err), KVL_LINK_DOWN);
  CHECK_EQ(kve_rmem_close(f.peer, f.rmem, 0, &err), KVL_OK);  // nothing touches it any more
  uint32_t rmem = 0;
  const uint64_t blob[2] = {1, 1};
  CHECK_EQ(kve_rmem_open(f.peer, blob, sizeof blob, 1, 3, 10, &rmem, &err), KVL_LINK_DOWN);
}

TEST(a_hanging_link_close_does_not_hang_the_closer) {
  Fixture f;
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  f.control.hang_link_close = true;
  kve_transfer *transfer = f.submit({f.range(0, 0, 64)});
  const auto start = Clock::now();
  kve_peer_close(f.peer, KVL_LINK_DOWN, "gone", 100);
  CHECK(ms_since(start) < 5000);
  CHECK_EQ(kve_transfer_done(transfer), 1);
  CHECK_EQ(finish(transfer).status, KVL_LINK_DOWN);
  f.control.hang_link_close = false;
}

TEST(a_hanging_connect_is_interrupted) {
  Fixture f;
  const kvl_link_params params = Fixture::link_params(KVL_ROLE_INITIATOR, "slow");
  Error err;
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_peer_open(f.channel, &params, &peer, &err), KVL_OK);
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(peer, KVL_PUT, nullptr, 0, 0, 0, 0, &transfer, &err), KVL_STATE);
  CHECK_CONTAINS(err.message, "'slow' is not connected yet");
  f.control.hang_connect = true;
  kvl_status status = KVL_OK;
  Error connect_err;
  std::thread connecting([&] { status = kve_peer_connect(peer, "x", 1, 60000, &connect_err); });
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  CHECK_EQ(kve_peer_connect(peer, "x", 1, 10, &err), KVL_STATE);
  CHECK_CONTAINS(err.message, "connecting already");
  const uint64_t blob[2] = {1, 1};
  uint32_t rmem = 0;
  CHECK_EQ(kve_rmem_open(peer, blob, sizeof blob, 1, 3, 10, &rmem, &err), KVL_STATE);
  kve_peer_close(peer, KVL_CANCELLED, "changed our mind", 5000);
  connecting.join();
  CHECK_EQ(status, KVL_CANCELLED);
  CHECK_EQ(f.control.interrupts, 1);
  f.control.hang_connect = false;
  kve_peer_release(peer);
}

TEST(interrupt_alone_stops_a_connect) {
  Fixture f;
  kve_peer_interrupt(f.peer);  // not connecting: nothing happens
  CHECK_EQ(f.control.interrupts, 0);
  const kvl_link_params params = Fixture::link_params(KVL_ROLE_INITIATOR, "slow");
  Error err;
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_peer_open(f.channel, &params, &peer, &err), KVL_OK);
  f.control.hang_connect = true;
  std::thread connecting([&] { CHECK_EQ(kve_peer_connect(peer, "x", 1, 60000, &err), KVL_CANCELLED); });
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  kve_peer_interrupt(peer);
  connecting.join();
  f.control.hang_connect = false;
  CHECK_EQ(kve_peer_check(peer, &err), KVL_CANCELLED);
  kve_peer_release(peer);
}

TEST(a_failed_connect_leaves_a_link_that_only_closes) {
  Fixture f;
  f.control.connect_status = KVL_REMOTE;
  const kvl_link_params params = Fixture::link_params();
  Error err;
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_peer_open(f.channel, &params, &peer, &err), KVL_OK);
  CHECK_EQ(kve_peer_connect(peer, "x", 1, 100, &err), KVL_REMOTE);
  CHECK_CONTAINS(err.message, "scripted failure");
  CHECK_EQ(kve_peer_connect(peer, "x", 1, 100, &err), KVL_REMOTE);
  kve_peer_close(peer, KVL_LINK_DOWN, "x", 1000);
  CHECK_EQ(f.control.link_closes, 1);
  kve_peer_release(peer);
}

TEST(acceptors_serve_without_connecting) {
  Fixture f;
  kve_peer *acceptor = f.open_peer(KVL_ROLE_ACCEPTOR, "in");
  Error err;
  CHECK_EQ(kve_peer_connect(acceptor, "x", 1, 100, &err), KVL_STATE);
  const uint32_t rmem = Fixture::open_rmem(acceptor, f.remote);
  const kvl_range range{f.mem, rmem, 0, 0, 4};
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(acceptor, KVL_PUT, &range, 1, 0, 0, 0, &transfer, &err), KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_OK);
  kve_peer_release(acceptor);
}

TEST(both_sides_connect_in_mode_both_and_one_way_providers_say_so) {
  FakeControl &control = *fake().control;
  control.connect_mode = KVL_CONNECT_BOTH;
  control.caps = control.caps & ~static_cast<uint64_t>(KVL_CAP_ACCEPTOR_SUBMIT);
  Fixture f;
  kve_peer *acceptor = f.open_peer(KVL_ROLE_ACCEPTOR, "in");
  Error err;
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(acceptor, KVL_PUT, nullptr, 0, 0, 0, 0, &transfer, &err), KVL_UNSUPPORTED);
  CHECK_CONTAINS(err.message, "'in' connected to us");
  CHECK_EQ(kve_peer_connect(acceptor, "x", 1, 100, &err), KVL_OK);
  CHECK_EQ(kve_peer_connect(acceptor, "x", 1, 100, &err), KVL_STATE);
  CHECK_CONTAINS(err.message, "connected already");
  kve_peer_release(acceptor);
}

TEST(limits_on_links_and_connects) {
  fake().control->max_links = 2;
  fake().control->max_connects = 1;
  Fixture f;
  const kvl_link_params params = Fixture::link_params(KVL_ROLE_INITIATOR, "second");
  Error err;
  kve_peer *second = nullptr, *third = nullptr;
  CHECK_EQ(kve_peer_open(f.channel, &params, &second, &err), KVL_OK);
  CHECK_EQ(kve_peer_open(f.channel, &params, &third, &err), KVL_BUSY);
  CHECK_CONTAINS(err.message, "2 links");
  kve_peer_close(f.peer, KVL_CANCELLED, "", 1000);
  CHECK_EQ(kve_peer_open(f.channel, &params, &third, &err), KVL_OK);
  f.control.hang_connect = true;
  std::thread connecting([&] {
    Error mine;
    CHECK_EQ(kve_peer_connect(second, "x", 1, 60000, &mine), KVL_OK);
  });
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  CHECK_EQ(kve_peer_connect(third, "x", 1, 100, &err), KVL_BUSY);
  f.control.hang_connect = false;
  connecting.join();
  CHECK_EQ(kve_peer_connect(third, "x", 1, 100, &err), KVL_OK);
  kve_peer_release(second);
  kve_peer_release(third);
}

TEST(link_check_finds_a_dead_link) {
  Fixture f;
  Error err;
  CHECK_EQ(kve_peer_check(f.peer, &err), KVL_OK);
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  f.control.check_status = KVL_LINK_DOWN;
  CHECK_EQ(kve_peer_check(f.peer, &err), KVL_LINK_DOWN);
  CHECK_CONTAINS(err.site, "link_check");
  CHECK_EQ(finish(transfer).status, KVL_LINK_DOWN);
}

TEST(an_engine_that_is_down_ends_everything) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  f.control.poll_status = KVL_ENGINE_DOWN;
  CHECK_EQ(finish(transfer).status, KVL_ENGINE_DOWN);
  Error err;
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_ENGINE_DOWN);
  const kvl_link_params params = Fixture::link_params();
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_peer_open(f.channel, &params, &peer, &err), KVL_ENGINE_DOWN);
  CHECK_CONTAINS(err.message, "scripted failure");
  // Polling goes on for the last completions, but calmly.
  const uint64_t before = f.control.polls;
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(f.control.polls - before < 100);
}

TEST(a_released_peer_is_closed) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 1)});
  kve_peer_release(f.peer);
  f.peer = nullptr;
  CHECK_EQ(finish(transfer).status, KVL_CANCELLED);
  CHECK(eventually([&] { return f.control.link_closes == 1; }));
}
