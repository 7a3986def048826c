// Closing a channel: everything ends, in bounded time, whatever hangs; and fork.
#include "harness.h"

TEST(close_ends_everything_and_may_be_repeated) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *first = f.submit({f.range(0, 0, 64)});
  kve_transfer *second = f.submit({f.range(0, 0, 64)}, KVL_PUT, 0, KVE_NOTIFY);
  Error err;
  CHECK_EQ(kve_channel_close(f.channel, 2000, &err), KVL_OK);
  CHECK_EQ(kve_channel_close(f.channel, 2000, &err), KVL_OK);
  CHECK_EQ(f.control.engine_closes, 1);
  CHECK_EQ(f.control.mem_closes, 1);
  for (kve_transfer *transfer : {first, second}) {
    CHECK_EQ(kve_transfer_done(transfer), 1);
    const kve_result result = result_of(transfer);
    CHECK_EQ(result.status, KVL_CANCELLED);
    CHECK_CONTAINS(result.message, "the channel was closed");
  }
  uint64_t ids[4];
  CHECK_EQ(kve_channel_drain(f.channel, ids, 4), 1);  // what was still to be told
  CHECK_EQ(ids[0], kve_transfer_id(second));
  // Every further call is refused, none crashes.
  uint64_t address = 0, length = 0;
  uint32_t handle = 0;
  const kvl_mem_desc desc = Fixture::describe(f.local);
  const kvl_link_params params = Fixture::link_params();
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_mem_alloc(f.channel, 0, 10, &address, &err), KVL_STATE);
  CHECK_EQ(kve_mem_open(f.channel, &desc, &handle, &err), KVL_STATE);
  CHECK_EQ(kve_mem_export(f.channel, f.mem, nullptr, &length, &err), KVL_STATE);
  CHECK_EQ(kve_mem_close(f.channel, f.mem, 0, &err), KVL_STATE);
  CHECK_EQ(kve_peer_open(f.channel, &params, &peer, &err), KVL_STATE);
  CHECK_CONTAINS(err.message, "the channel is closed");
  CHECK_EQ(kve_peer_connect(f.peer, "x", 1, 1, &err), KVL_CANCELLED);
  CHECK_EQ(f.refused({f.range(0, 0, 1)}, err), KVL_CANCELLED);
  kve_mem_free(f.channel, 1);
  kve_transfer_cancel(first);
  CHECK_EQ(kve_transfer_wait(first, 0), 1);
  kve_peer_close(f.peer, KVL_OK, nullptr, 0);
  kve_transfer_release(first);
  kve_transfer_release(second);
}

TEST(a_transfer_outlives_every_other_handle) {
  kve_transfer *transfer;
  {
    Fixture f;
    transfer = f.submit({f.range(0, 0, 8)});
  }
  CHECK_EQ(kve_transfer_done(transfer), 1);
  CHECK_EQ(result_of(transfer).bytes, 8);
  kve_transfer_release(transfer);
}

TEST(release_without_close_closes) {
  FakeControl &control = *fake().control;
  kve_channel_params params{};
  params.struct_size = sizeof params;
  params.default_timeout_ms = params.cancel_grace_ms = 1000;
  Error err;
  kve_channel *channel = nullptr;
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_OK);
  kve_channel_release(channel);
  CHECK_EQ(control.engine_closes, 1);
}

namespace {

// Makes one provider call hang, closes, expects TIMEOUT in time and a word on what hangs; then lets it go on and
// expects the rest of the closing to happen.
void hanging(std::atomic<bool> FakeControl::*call, const char *stage, bool with_transfer) {
  Fixture f(30000, 100);
  f.control.submit = Submit::kHold;
  f.control.honour_cancel = false;
  kve_transfer *transfer = with_transfer ? f.submit({f.range(0, 0, 64)}) : nullptr;
  f.control.*call = true;
  if (call == &FakeControl::hang_wait || call == &FakeControl::hang_poll) {
    f.api.inject(0, KVL_OK);  // make the engine thread go round once
    CHECK(eventually([&] { return f.control.hanging == 1; }));
  }
  Error err;
  const auto start = Clock::now();
  CHECK_EQ(kve_channel_close(f.channel, 200, &err), KVL_TIMEOUT);
  CHECK(ms_since(start) < 5000);
  CHECK_CONTAINS(err.message, stage);
  if (transfer != nullptr) {
    CHECK_EQ(kve_transfer_done(transfer), 1);
    CHECK(finish(transfer).status == KVL_CANCELLED);
  }
  f.control.*call = false;
}

}  // namespace

TEST(close_with_a_hanging_wait) { hanging(&FakeControl::hang_wait, "the engine's thread", false); }
TEST(close_with_a_hanging_wait_and_a_transfer) { hanging(&FakeControl::hang_wait, "hangs in", true); }
TEST(close_with_a_hanging_poll) { hanging(&FakeControl::hang_poll, "the engine's thread", false); }
TEST(close_with_a_hanging_poll_and_a_transfer) { hanging(&FakeControl::hang_poll, "hangs in", true); }
TEST(close_with_a_hanging_link_close) { hanging(&FakeControl::hang_link_close, "link_close", true); }
TEST(close_with_a_hanging_engine_close) { hanging(&FakeControl::hang_engine_close, "engine_close", true); }

TEST(close_beside_a_hanging_call) {
  Fixture f;
  f.control.hang_mem_copy = true;
  char byte = 'x';
  std::thread copying([&] {
    Error mine;
    CHECK_EQ(kve_mem_copy(f.channel, f.mem, 0, &byte, 1, 1, &mine), KVL_OK);
  });
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  Error err;
  CHECK_EQ(kve_channel_close(f.channel, 100, &err), KVL_TIMEOUT);
  CHECK_CONTAINS(err.message, "an API call");
  CHECK_EQ(f.control.engine_closes, 0);
  f.control.hang_mem_copy = false;
  copying.join();
}

TEST(close_beside_a_hanging_submit) {
  Fixture f;
  f.control.hang_submit = true;
  kve_transfer *transfer = nullptr;
  std::thread submitting([&] { transfer = f.submit({f.range(0, 0, 8)}); });
  CHECK(eventually([&] { return f.control.hanging == 1; }));
  // Another submitter does not get stuck behind it.
  kve_transfer *queued = f.submit({f.range(0, 0, 8)});
  Error err;
  CHECK_EQ(kve_channel_close(f.channel, 100, &err), KVL_TIMEOUT);
  CHECK_EQ(finish(queued).status, KVL_CANCELLED);
  f.control.hang_submit = false;
  submitting.join();
  kve_transfer_release(transfer);
}

TEST(a_child_may_use_nothing) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 8)});
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    Error err;
    kve_transfer *another = nullptr;
    const kvl_range range = f.range(0, 0, 1);
    uint32_t handle = 0;
    const kvl_mem_desc desc = Fixture::describe(f.local);
    kve_result result{};
    result.struct_size = sizeof result;
    bool good = kve_submit(f.peer, KVL_PUT, &range, 1, 0, 0, 0, &another, &err) == KVL_STATE;
    good = good && std::strstr(err.message, "parent process") != nullptr;
    good = good && kve_mem_open(f.channel, &desc, &handle, &err) == KVL_STATE;
    good = good && kve_mem_close(f.channel, f.mem, 0, &err) == KVL_STATE;
    good = good && kve_peer_check(f.peer, &err) == KVL_STATE;
    good = good && kve_rmem_close(f.peer, f.rmem, 0, &err) == KVL_STATE;
    good = good && kve_channel_event_fd(f.channel) == -1;
    good = good && kve_transfer_wait(transfer, 10000) == 0 && kve_transfer_done(transfer) == 0;
    good = good && kve_transfer_result(transfer, &result) == KVL_STATE;
    kve_transfer_cancel(transfer);
    kve_peer_close(f.peer, KVL_OK, "", 10000);
    good = good && kve_channel_close(f.channel, 10000, &err) == KVL_STATE;
    kve_transfer_release(transfer);
    kve_peer_release(f.peer);
    kve_channel_release(f.channel);
    _exit(good ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  f.api.release_held(KVL_OK);  // the parent is unharmed
  CHECK_EQ(finish(transfer).status, KVL_OK);
}
