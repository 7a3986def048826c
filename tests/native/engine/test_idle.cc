// An idle channel costs nothing: its thread sleeps in the provider's wait.
#include <time.h>

#include "harness.h"

namespace {

double cpu_ms() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
}

// CPU of the whole process over a second in which its only other thread sleeps.
void stays_idle(Fixture &f) {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const uint64_t polls = f.control.polls, waits = f.control.waits;
  const double before = cpu_ms();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  const double used = cpu_ms() - before;
  std::printf("  idle second: %.3f ms of CPU, %llu polls\n", used,
              static_cast<unsigned long long>(f.control.polls - polls));
  CHECK(used < 30);
  CHECK(f.control.polls - polls <= 2);
  CHECK(f.control.waits - waits <= 2);
}

}  // namespace

TEST(idle_after_opening) {
  Fixture f;
  stays_idle(f);
}

TEST(idle_after_work) {
  Fixture f;
  f.control.submit = Submit::kLater;
  for (int i = 0; i < 100; ++i) CHECK_EQ(finish(f.submit({f.range(0, 0, 8)})).status, KVL_OK);
  stays_idle(f);
}

TEST(idle_with_a_transfer_in_flight) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 8)});
  stays_idle(f);
  f.api.release_held(KVL_OK);
  CHECK_EQ(finish(transfer).status, KVL_OK);
}

TEST(a_sleeping_waiter_is_idle_too) {
  Fixture f;
  f.control.submit = Submit::kHold;
  kve_transfer *transfer = f.submit({f.range(0, 0, 8)});
  std::thread waiter([&] { CHECK_EQ(kve_transfer_wait(transfer, 20000), 1); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // its first spin is over
  stays_idle(f);
  f.api.release_held(KVL_OK);
  waiter.join();
  CHECK_EQ(finish(transfer).status, KVL_OK);
}

TEST(many_transfers_wake_the_engine_thread_once) {
  Fixture f;
  f.control.submit = Submit::kHold;
  std::vector<kve_transfer *> transfers;
  for (int i = 0; i < 500; ++i) transfers.push_back(f.submit({f.range(0, 0, 8)}));
  CHECK(f.control.wakes <= 5);  // for the first deadline, not for each
  f.api.release_held(KVL_OK);
  for (kve_transfer *transfer : transfers) CHECK_EQ(finish(transfer).status, KVL_OK);
}
