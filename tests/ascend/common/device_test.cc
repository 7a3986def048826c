// A device and its context on the simulator: the caller's context survives every entry, references are given back,
// vendor calls that hang are given up.
#include "ascend/device.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <thread>

#include "ascend/common/sim.h"
#include "ascend/runner.h"

using namespace kvlink::ascend;
using namespace kvlink::test;

namespace {

Deadline in_ms(uint64_t ms) { return {kvlink::host::now_ns() + ms * 1000000, -1}; }
bool says(const Failure &failure, const char *text) { return failure.message.find(text) != std::string::npos; }

aclrtContext current(const AclApi &acl) {
  aclrtContext context = nullptr;
  return acl.aclrtGetCurrentContext(&context) == ACL_SUCCESS ? context : nullptr;
}

void test_identity(const Device &device) {
  CHECK_EQ(device.id(), 0);
  CHECK_EQ(device.physical_id(), 6);
  CHECK(device.soc() == SocFamily::kA3 && device.soc_name() == "Ascend910_9382");
  CHECK(device.super_device_id() >= 0 && device.super_pod_id() == 3);
  CHECK(device.cann().text == "9.1.0");
  CHECK(device.context() != nullptr);
}

void test_context_is_restored(const std::shared_ptr<const Device> &device) {
  const AclApi &acl = device->acl();
  // This thread opened the device and had none before.
  CHECK(acl.aclrtSetDevice(1) == ACL_SUCCESS);
  const aclrtContext mine = current(acl);
  CHECK(mine != nullptr && mine != device->context());
  {
    const ContextGuard guard = device->enter();
    CHECK(guard.ok() && current(acl) == device->context());
    {
      const ContextGuard again = device->enter();
      CHECK(again.ok());
    }
    CHECK(current(acl) == device->context());
  }
  CHECK(current(acl) == mine);
  {
    const RestoreContext restore(acl);
    CHECK(acl.aclrtSetDevice(0) == ACL_SUCCESS);
    CHECK(current(acl) != mine);
  }
  CHECK(current(acl) == mine);
  CHECK(acl.aclrtResetDevice(0) == ACL_SUCCESS);
  std::thread other([&] {
    CHECK(current(acl) == nullptr);
    const ContextGuard guard = device->enter();
    CHECK(guard.ok() && current(acl) == device->context());
  });
  other.join();
  CHECK(acl.aclrtResetDevice(1) == ACL_SUCCESS);
}

void test_opening_restores(const AclApi &acl) {
  CHECK(acl.aclrtSetDevice(1) == ACL_SUCCESS);
  const aclrtContext mine = current(acl);
  std::unique_ptr<Device> second;
  CHECK(Device::open(0, &second).ok());
  CHECK(current(acl) == mine);
  second.reset();
  CHECK(current(acl) == mine);
  CHECK(acl.aclrtResetDevice(1) == ACL_SUCCESS);
}

void test_pointer_kinds(const Device &device) {
  const ContextGuard guard = device.enter();
  void *memory = nullptr, *pinned = nullptr;
  CHECK(allocate_device(device.acl(), 100, &memory).ok());
  CHECK_EQ(reinterpret_cast<uint64_t>(memory) % kHugePage, uint64_t{0});
  CHECK(allocate_pinned(device.acl(), 100, &pinned).ok());
  CHECK_EQ(static_cast<char *>(pinned)[99], 0);
  std::vector<char> plain(4096);
  CHECK(pointer_kind(device.acl(), memory) == PointerKind::kDevice);
  CHECK(pointer_kind(device.acl(), static_cast<char *>(memory) + 50) == PointerKind::kDevice);
  CHECK(pointer_kind(device.acl(), pinned) == PointerKind::kPinnedHost);
  CHECK(pointer_kind(device.acl(), plain.data()) == PointerKind::kHost);
  // The probe fails on some mapped memory: that is host memory.
  simulator<void (*)(const void *, size_t)>("cann_sim_refuse_pointer")(plain.data(), plain.size());
  CHECK(pointer_kind(device.acl(), plain.data()) == PointerKind::kHost);
  CHECK(allocate_device(device.acl(), 0, &memory).status == KVL_INVALID);
  CHECK(allocate_device(device.acl(), UINT64_MAX, &memory).status == KVL_INVALID);
  void *too_much = nullptr;
  const Failure oom = allocate_device(device.acl(), uint64_t{1} << 40, &too_much);
  CHECK(oom.status == KVL_NO_RESOURCE && oom.site == "aclrtMalloc" && says(oom, "207001"));
  CHECK(device.acl().aclrtFree(memory) == ACL_SUCCESS);
  CHECK(device.acl().aclrtFreeHost(pinned) == ACL_SUCCESS);
}

struct Gate {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  void pass() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return open; });
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex);
    open = true;
    changed.notify_all();
  }
};

void test_runner(const std::shared_ptr<const Device> &device) {
  VendorRunner runner(device);
  const AclApi *acl = &device->acl();
  const aclrtContext context = device->context();
  CHECK(runner
            .run("good", in_ms(10000),
                 [=] { return current(*acl) == context ? Failure{} : Failure{KVL_INTERNAL, 0, "", ""}; })
            .ok());
  const Failure bad = runner.run("bad", in_ms(10000), [] { return make_failure(KVL_BUSY, "bad", "no"); });
  CHECK(bad.status == KVL_BUSY && runner.health().ok());
  CHECK(runner.run("throws", in_ms(10000), []() -> Failure { throw std::runtime_error("x"); }).status == KVL_INTERNAL);

  // A hanging call is given up at its deadline, and undone when it comes back after all.
  auto gate = std::make_shared<Gate>();
  auto undone = std::make_shared<Gate>();
  const uint64_t before = kvlink::host::now_ns();
  const Failure late = runner.run_exclusive(
      "HcclCommInit", in_ms(200),
      [gate] {
        gate->pass();
        return Failure{};
      },
      [undone](const Failure &result) {
        CHECK(result.ok());
        undone->release();
      });
  CHECK(late.status == KVL_TIMEOUT && says(late, "HcclCommInit") && says(late, "given up"));
  CHECK(kvlink::host::now_ns() - before < uint64_t{3} * 1000000000);
  CHECK(runner.degraded() && runner.abandoned() == 1);
  CHECK(runner.health().status == KVL_ENGINE_DOWN && says(runner.health(), "degraded"));
  // It keeps the process's lock: later ones fail at their own deadline and name it.
  const Failure next = runner.run_exclusive("HcclCommDestroy", in_ms(100), [] { return Failure{}; });
  CHECK(next.status == KVL_TIMEOUT && says(next, "HcclCommInit"));
  CHECK(runner.run("other", in_ms(10000), [] { return Failure{}; }).ok());
  // An interrupt ends the wait at once.
  const int interrupt = eventfd(1, EFD_CLOEXEC);
  auto second = std::make_shared<Gate>();
  const Failure cancelled =
      runner.run("slow", {kvlink::host::now_ns() + uint64_t{60} * 1000000000, interrupt}, [second] {
        second->pass();
        return Failure{};
      });
  CHECK(cancelled.status == KVL_CANCELLED);
  close(interrupt);
  gate->release();
  second->release();
  undone->pass();
  CHECK(runner.run_exclusive("HcclCommInit", in_ms(10000), [] { return Failure{}; }).ok());
  const uint64_t until = kvlink::host::now_ns() + uint64_t{10} * 1000000000;
  while (runner.degraded() && kvlink::host::now_ns() < until) std::this_thread::yield();
  CHECK(runner.health().ok());
}

void test_hang_in_the_vendor(const std::shared_ptr<const Device> &device) {
  VendorRunner runner(device);
  set_faults("aclrtCreateStream=hang");
  const Failure failure = runner.run("aclrtCreateStream", in_ms(200), [device] {
    aclrtStream stream = nullptr;
    CHECK(device->acl().aclrtCreateStream(&stream) != ACL_SUCCESS ||
          device->acl().aclrtDestroyStream(stream) == ACL_SUCCESS);
    return Failure{};
  });
  CHECK(failure.status == KVL_TIMEOUT);
  set_faults("");
  release_hangs();
  const uint64_t until = kvlink::host::now_ns() + uint64_t{10} * 1000000000;
  while (runner.degraded() && kvlink::host::now_ns() < until) std::this_thread::yield();
  CHECK(!runner.degraded());
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  use_simulator(arguments[1], "9.1",
                {{"CANN_SIM_SOC", "Ascend910_9382"}, {"CANN_SIM_PHYSICAL_IDS", "6,7"}, {"CANN_SIM_SUPER_POD", "3"}});
  const int64_t contexts = live("context");
  {
    std::unique_ptr<Device> opened;
    const Failure failure = Device::open(0, &opened);
    if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
    CHECK(failure.ok());
    const std::shared_ptr<const Device> device = std::move(opened);
    test_identity(*device);
    test_context_is_restored(device);
    test_opening_restores(device->acl());
    test_pointer_kinds(*device);
    test_runner(device);
    test_hang_in_the_vendor(device);
  }
  // The threads of calls that were given up hold the device until they end. The process's first reference stays: a
  // thread that had no context still has the device's.
  const uint64_t until = kvlink::host::now_ns() + uint64_t{10} * 1000000000;
  while (live("device_reference") > 1 && kvlink::host::now_ns() < until) std::this_thread::yield();
  CHECK_EQ(live("device_reference"), int64_t{1});
  CHECK_EQ(live("context"), contexts + 1);
  CHECK_EQ(live("device_memory"), int64_t{0});
  CHECK_EQ(live("host_memory"), int64_t{0});
  std::puts("device: passed");
  return 0;
}
