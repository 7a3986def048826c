// Many threads on one channel. Run under the thread sanitizer these show races; plain, they show lost wake-ups.
#include <poll.h>

#include <mutex>
#include <random>
#include <set>

#include "harness.h"

namespace {

// Completes held submits from the side until told to stop.
class Releaser {
 public:
  explicit Releaser(FakeApi api)
      : thread_([this, api] {
          while (!stop_) {
            api.release_held(KVL_OK);
            std::this_thread::sleep_for(std::chrono::microseconds(200));
          }
        }) {}
  ~Releaser() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

Submit how(unsigned i) { return i % 3 == 0 ? Submit::kInline : i % 3 == 1 ? Submit::kLater : Submit::kHold; }

}  // namespace

TEST(submitters_waiters_and_cancellers) {
  fake().control->record = false;
  fake().control->max_ranges = 3;
  Fixture f;
  Releaser releaser(f.api);
  constexpr int kThreads = 6, kRounds = 300;
  std::atomic<uint64_t> ended{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < kRounds; ++i) {
        f.control.submit = how(random());
        if (random() % 8 == 0) f.control.again = 3;
        std::vector<kvl_range> ranges;
        for (uint64_t k = 0, n = random() % 8; k < n; ++k) {
          // A stripe of its own for each thread, so that the fake's copies do not overlap.
          ranges.push_back(
              f.range(static_cast<uint64_t>(t) * 1024 + k * 32, static_cast<uint64_t>(t) * 1024 + k * 48, 16));
        }
        kve_transfer *transfer = f.submit(ranges, random() % 2 == 0 ? KVL_PUT : KVL_GET);
        const bool cancel = random() % 4 == 0;
        if (cancel) kve_transfer_cancel(transfer);
        if (random() % 5 == 0) {
          kve_transfer_release(transfer);
          continue;
        }
        CHECK_EQ(kve_transfer_wait(transfer, 30000), 1);
        const kve_result result = result_of(transfer);
        CHECK(result.status == KVL_OK || (cancel && result.status == KVL_CANCELLED));
        ++ended;
        kve_transfer_release(transfer);
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  CHECK(ended > 0);
  CHECK(eventually([&] { return f.statistics().in_flight == 0; }));
  const kve_statistics statistics = f.statistics();
  CHECK_EQ(statistics.submitted, kThreads * kRounds);
  CHECK_EQ(statistics.succeeded + statistics.cancelled, kThreads * kRounds);
}

TEST(several_waiters_of_one_transfer) {
  Fixture f;
  f.control.submit = Submit::kHold;
  for (int round = 0; round < 50; ++round) {
    kve_transfer *transfer = f.submit({f.range(0, 0, 8)});
    std::vector<std::thread> waiters;
    for (int i = 0; i < 4; ++i) waiters.emplace_back([&] { CHECK_EQ(kve_transfer_wait(transfer, 30000), 1); });
    if (round % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_EQ(f.api.release_held(KVL_OK), 1);
    for (std::thread &waiter : waiters) waiter.join();
    CHECK_EQ(finish(transfer).status, KVL_OK);
  }
}

TEST(no_notification_is_lost_or_given_twice) {
  fake().control->record = false;
  Fixture f;
  Releaser releaser(f.api);
  constexpr int kThreads = 4, kRounds = 400;
  std::mutex mutex;
  std::set<uint64_t> expected;
  std::atomic<int> submitting{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < kRounds; ++i) {
        f.control.submit = how(random());
        const bool at_submit = random() % 2 == 0;
        kve_transfer *transfer = f.submit({f.range(static_cast<uint64_t>(t) * 64, static_cast<uint64_t>(t) * 64, 8)},
                                          KVL_PUT, 0, at_submit ? KVE_NOTIFY : 0);
        {
          std::lock_guard<std::mutex> lock(mutex);
          expected.insert(kve_transfer_id(transfer));
        }
        if (!at_submit || random() % 3 == 0) kve_transfer_notify(transfer);
        kve_transfer_release(transfer);
      }
      --submitting;
    });
  }
  // The reader sleeps on the descriptor alone: a lost wake-up shows as a poll that times out.
  std::set<uint64_t> got;
  while (got.size() < kThreads * kRounds) {
    pollfd entry{kve_channel_event_fd(f.channel), POLLIN, 0};
    CHECK_EQ(poll(&entry, 1, 20000), 1);
    uint64_t ids[7];
    const uint32_t count = kve_channel_drain(f.channel, ids, 7);
    for (uint32_t i = 0; i < count; ++i) CHECK(got.insert(ids[i]).second);
  }
  for (std::thread &thread : threads) thread.join();
  CHECK(got == expected);
}

TEST(regions_and_peers_come_and_go_under_load) {
  fake().control->record = false;
  Fixture f;
  Releaser releaser(f.api);
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> moved{0};
  std::vector<std::thread> threads;
  // Submitters on the lasting peer, with a region that another thread keeps closing and opening.
  std::vector<char> shared(4096);
  std::atomic<uint32_t> handle{f.open_mem(shared)};
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      while (!stop) {
        f.control.submit = how(random());
        const uint64_t at = static_cast<uint64_t>(t) * 512;
        const kvl_range range{handle, f.rmem, at, at, 16};
        Error err;
        kve_transfer *transfer = nullptr;
        const kvl_status status = kve_submit(f.peer, KVL_PUT, &range, 1, 0, 0, 0, &transfer, &err);
        if (status != KVL_OK && status != KVL_INVALID && status != KVL_DENIED) {
          std::fprintf(stderr, "submit: %d %s\n", status, err.message);
          std::_Exit(1);
        }
        if (status != KVL_OK) continue;
        const kve_result result = finish(transfer, 30000);
        CHECK(result.status == KVL_OK || result.status == KVL_CANCELLED);
        if (result.status == KVL_OK) ++moved;
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) {
      Error err;
      CHECK_EQ(kve_mem_close(f.channel, handle, 30000, &err), KVL_OK);
      handle = f.open_mem(shared);
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  // Peers that live for a few transfers and are closed with work in flight.
  threads.emplace_back([&] {
    std::vector<char> memory(4096);
    for (unsigned i = 0; i < 60; ++i) {
      kve_peer *peer = f.open_peer(KVL_ROLE_INITIATOR, "brief");
      const uint32_t rmem = Fixture::open_rmem(peer, memory);
      std::vector<kve_transfer *> transfers;
      for (int k = 0; k < 4; ++k) {
        const kvl_range range{f.mem, rmem, 8192, 0, 16};
        Error err;
        kve_transfer *transfer = nullptr;
        CHECK_EQ(kve_submit(peer, KVL_PUT, &range, 1, 0, 0, 0, &transfer, &err), KVL_OK);
        transfers.push_back(transfer);
      }
      kve_peer_close(peer, KVL_LINK_DOWN, "brief", 5000);
      for (kve_transfer *transfer : transfers) {
        const kve_result result = finish(transfer, 30000);
        CHECK(result.status == KVL_OK || result.status == KVL_LINK_DOWN);
      }
      kve_peer_release(peer);
    }
    stop = true;
  });
  for (std::thread &thread : threads) thread.join();
  CHECK(moved > 0);
}

TEST(close_the_channel_under_load) {
  for (unsigned round = 0; round < 15; ++round) {
    FakeControl &control = *fake().control;
    control.record = false;
    Fixture f;
    Releaser releaser(f.api);
    std::vector<std::thread> threads;
    std::atomic<int> running{0};
    for (unsigned t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(t + round * 10);
        ++running;
        for (;;) {
          f.control.submit = how(random());
          const kvl_range range{f.mem, f.rmem, t * 64, t * 64, 16};
          Error err;
          kve_transfer *transfer = nullptr;
          const kvl_status status = kve_submit(f.peer, KVL_PUT, &range, 1, 0, 0, random() % 2, &transfer, &err);
          if (status != KVL_OK) {
            CHECK(status == KVL_CANCELLED || status == KVL_STATE);
            break;
          }
          CHECK_EQ(kve_transfer_wait(transfer, 30000), 1);
          const kve_result result = result_of(transfer);
          CHECK(result.status == KVL_OK || result.status == KVL_CANCELLED);
          kve_transfer_release(transfer);
        }
      });
    }
    CHECK(eventually([&] { return running == 4; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 5));
    Error err;
    CHECK_EQ(kve_channel_close(f.channel, 10000, &err), KVL_OK);
    for (std::thread &thread : threads) thread.join();
  }
}
