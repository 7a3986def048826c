// Process-wide state: the init lock, registrations, calls that hang, memory in quarantine, sleeping and waking.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "ascend/event_loop.h"
#include "ascend/quarantine.h"
#include "ascend/registry.h"
#include "native/host/harness.h"

using namespace kvlink::ascend;

namespace {

Deadline in_ms(uint64_t ms) { return {now_ns() + ms * 1000000, -1}; }
bool says(const Failure &failure, const char *text) { return failure.message.find(text) != std::string::npos; }

void test_init_lock() {
  InitLock first;
  CHECK(InitLock::acquire("HcclCommInit", in_ms(100), &first).ok());
  const uint64_t before = now_ns();
  InitLock second;
  const Failure refused = InitLock::acquire("HcclCommDestroy", in_ms(200), &second);
  CHECK(refused.status == KVL_TIMEOUT && says(refused, "HcclCommInit") && refused.site == "HcclCommDestroy");
  CHECK(now_ns() - before >= uint64_t{190} * 1000000);
  CHECK(!second);
  std::thread waiter([] {
    InitLock third;
    CHECK(InitLock::acquire("third", in_ms(30000), &third).ok());
  });
  InitLock moved = std::move(first);
  CHECK(moved && !first);
  moved.release();
  waiter.join();
  CHECK(InitLock::acquire("again", in_ms(100), &second).ok());
}

void test_registry() {
  Registry registry;
  int registered = 0, deregistered = 0;
  static char handles[8];
  const auto add = [&](void **handle) {
    *handle = &handles[registered++];
    return Failure{};
  };
  const auto remove = [&](void *) {
    ++deregistered;
    return Failure{};
  };
  const Registry::Range range{0, 0x10000, 0x1000, false};
  void *first = nullptr, *second = nullptr;
  CHECK(registry.acquire(range, "engine A", add, &first).ok());
  CHECK(registry.acquire(range, "engine B", add, &second).ok());
  CHECK(first == second);
  CHECK_EQ(registered, 1);
  const Registry::Range overlaps[] = {{0, 0x10800, 0x1000, false}, {0, 0xf800, 0x1000, false},
                                      {0, 0x10000, 0x800, false},  {0, 0x10400, 0x10, false},
                                      {0, 0xf000, 0x4000, false},  {0, 0x10000, 0x1000, true}};
  for (const Registry::Range &other : overlaps) {
    const Failure failure = registry.acquire(other, "engine C", add, &second);
    CHECK(failure.status == KVL_INVALID && says(failure, "engine A") && says(failure, "0x10000"));
  }
  CHECK(registry.acquire({1, 0x10800, 0x1000, true}, "other device", add, &second).ok());
  CHECK(registry.acquire({0, 0x11000, 0x1000, false}, "next to it", add, &second).ok());
  CHECK(registry.acquire({0, 0xf000, 0x1000, false}, "before it", add, &second).ok());
  CHECK_EQ(registry.size(), size_t{4});
  CHECK(registry.release(range, remove).ok());
  CHECK_EQ(deregistered, 0);
  CHECK(registry.release(range, remove).ok());
  CHECK_EQ(deregistered, 1);
  CHECK(registry.release(range, remove).status == KVL_INVALID);
  // A vendor that refuses: nothing is entered, nothing is forgotten.
  const auto refuse = [](void **) { return make_failure(KVL_NO_RESOURCE, "vendor", "no"); };
  CHECK(registry.acquire(range, "engine A", refuse, &first).status == KVL_NO_RESOURCE);
  CHECK(registry.acquire(range, "engine A", add, &first).ok());
  const auto busy = [](void *) { return make_failure(KVL_BUSY, "vendor", "bound"); };
  CHECK(registry.release(range, busy).status == KVL_BUSY);
  CHECK(registry.release(range, remove).ok());
  CHECK(registry.acquire({0, UINT64_MAX - 10, 100, false}, "wraps", add, &first).status == KVL_INVALID);
  CHECK(registry.acquire({0, 0x500, 0, false}, "empty", add, &first).status == KVL_INVALID);
}

void test_quarantine() {
  Quarantine quarantine;
  CHECK(quarantine.check(0, UINT64_MAX, "mem_close").ok());
  const uint64_t first = quarantine.add(0x1000, 0x1000, "HcclCommDestroy hangs");
  const uint64_t second = quarantine.add(0x1800, 0x1000, "the peer is unknown");
  CHECK_EQ(quarantine.bytes(), uint64_t{0x2000});
  const Failure held = quarantine.check(0x1fff, 1, "mem_close");
  CHECK(held.status == KVL_BUSY && held.site == "mem_close" && says(held, "HcclCommDestroy hangs"));
  CHECK(quarantine.check(0x2800, 1, "mem_close").ok());
  CHECK(quarantine.check(0xfff, 1, "mem_close").ok());
  quarantine.release(first);
  CHECK(says(quarantine.check(0x1fff, 1, "mem_close"), "the peer is unknown"));
  quarantine.release(second);
  quarantine.release(second);
  CHECK(quarantine.check(0x1fff, 1, "mem_close").ok());
}

uint64_t cpu_ns() {
  rusage usage{};
  CHECK(getrusage(RUSAGE_THREAD, &usage) == 0);
  const auto ns = [](const timeval &time) {
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_usec) * 1000u;
  };
  return ns(usage.ru_utime) + ns(usage.ru_stime);
}

class Counter final : public Watch {
 public:
  void on_events(uint32_t) override {
    char byte;
    if (read(fd.get(), &byte, 1) == 1) ++count;
  }
  int count = 0;
};

void test_event_loop() {
  EventLoop loop;
  CHECK(loop.open().ok());
  // An idle wait takes its time and no CPU.
  const uint64_t before = now_ns(), cpu = cpu_ns();
  loop.wait(300, false);
  CHECK(now_ns() - before >= uint64_t{290} * 1000000);
  CHECK(cpu_ns() - cpu < uint64_t{20} * 1000000);
  // A wake just before counts; one during it ends it.
  loop.wake();
  loop.wait(60000, false);
  std::atomic<bool> waiting{false};
  std::thread waker([&] {
    while (!waiting.load()) std::this_thread::yield();
    loop.wake();
  });
  waiting.store(true);
  loop.wait(60000, false);
  waker.join();
  // With transfers in flight it looks again soon, at most every half millisecond.
  const uint64_t begin = now_ns();
  for (int i = 0; i < 20; ++i) loop.wait(60000, true);
  CHECK(now_ns() - begin < uint64_t{5} * 1000000000);
  // Descriptors.
  int ends[2];
  CHECK(pipe(ends) == 0);
  UniqueFd out(ends[1]);
  auto counter = std::make_unique<Counter>();
  counter->fd = UniqueFd(ends[0]);
  Counter *watched = counter.get();
  {
    const auto lock = loop.lock();
    CHECK(loop.watch(watched, 1 /* EPOLLIN */).ok());
  }
  CHECK(write(out.get(), "ab", 2) == 2);
  loop.wait(60000, false);
  {
    const auto lock = loop.lock();
    loop.dispatch(UINT64_MAX);
    loop.dispatch(UINT64_MAX);
    CHECK_EQ(watched->count, 2);
    loop.bury(std::move(counter));
    loop.dispatch(UINT64_MAX);
  }
}

}  // namespace

int main() {
  test_init_lock();
  test_registry();
  test_quarantine();
  test_event_loop();
  std::puts("process: passed");
  return 0;
}
