// Lanes on the simulator: complete is not success, a failed lane is destroyed, the pool is bounded.
#include "ascend/streams.h"

#include <cstring>
#include <thread>

#include "ascend/common/sim.h"
#include "ascend/device.h"
#include "host/socket.h"

using namespace kvlink::ascend;
using namespace kvlink::test;

namespace {

using MemcpyAsync = aclError (*)(void *, size_t, const void *, size_t, aclrtMemcpyKind, aclrtStream);

struct Buffers {
  explicit Buffers(const AclApi &table) : acl(table) {
    CHECK(allocate_device(acl, 4096, &device).ok());
    CHECK(allocate_pinned(acl, 4096, &host).ok());
  }
  ~Buffers() {
    CHECK(acl.aclrtFree(device) == ACL_SUCCESS);
    CHECK(acl.aclrtFreeHost(host) == ACL_SUCCESS);
  }
  const AclApi &acl;
  void *device = nullptr, *host = nullptr;
};

void copy_on(const Lane &lane, const Buffers &buffers) {
  const auto copy = simulator<MemcpyAsync>("aclrtMemcpyAsync");
  CHECK(copy(buffers.device, 4096, buffers.host, 4096, ACL_MEMCPY_HOST_TO_DEVICE, lane.stream) == ACL_SUCCESS);
}

void await(const AclApi &acl, const Lane &lane) {
  bool complete = false;
  const uint64_t until = kvlink::host::now_ns() + uint64_t{10} * 1000000000;
  while (!complete && kvlink::host::now_ns() < until) CHECK(query(acl, lane, &complete).ok());
  CHECK(complete);
}

void test_success(const AclApi &acl) {
  StreamPool pool(acl, 2);
  Buffers buffers(acl);
  Lane lane, second, third;
  CHECK(pool.acquire(&lane).ok() && pool.acquire(&second).ok());
  CHECK(pool.acquire(&third).status == KVL_AGAIN);
  std::memset(buffers.host, 7, 4096);
  copy_on(lane, buffers);
  CHECK(record(acl, lane).ok());
  bool complete = true;
  CHECK(query(acl, lane, &complete).ok() && !complete);  // the simulator takes its time
  await(acl, lane);
  CHECK(drained(acl, lane, 1000).ok());
  pool.release(lane);
  CHECK(pool.acquire(&third).ok() && third.stream == lane.stream);
  CHECK_EQ(pool.in_use(), 2u);
  pool.release(third);
  pool.release(second);
  CHECK_EQ(live("stream"), int64_t{2});
}

void test_failure_behind_a_complete_event(const AclApi &acl) {
  StreamPool pool(acl, 4);
  Buffers buffers(acl);
  Lane lane;
  CHECK(pool.acquire(&lane).ok());
  set_faults("op.memcpy=fail:507013");
  copy_on(lane, buffers);
  CHECK(record(acl, lane).ok());
  await(acl, lane);  // COMPLETE, and yet:
  const Failure failure = drained(acl, lane, 1000);
  CHECK(failure.status == KVL_LINK_DOWN && failure.code == 507013);
  CHECK(failure.message.find("DMA") != std::string::npos);
  set_faults("");
  CHECK(pool.discard(lane).ok());
  CHECK_EQ(pool.in_use(), 0u);
  CHECK_EQ(live("stream"), int64_t{0});
}

void test_stuck(const AclApi &acl) {
  StreamPool pool(acl, 4);
  Buffers buffers(acl);
  Lane lane;
  CHECK(pool.acquire(&lane).ok());
  set_faults("op.memcpy=hang");
  copy_on(lane, buffers);
  CHECK(record(acl, lane).ok());
  const Failure failure = drained(acl, lane, 50);
  CHECK(failure.status == KVL_TIMEOUT && failure.code == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
  set_faults("");
  std::thread end([] { release_hangs(); });
  CHECK(pool.discard(lane).ok());
  end.join();
  CHECK_EQ(live("stream"), int64_t{0});
}

void test_exhausted(const AclApi &acl) {
  StreamPool pool(acl, 100);
  std::vector<Lane> lanes(6);
  for (Lane &lane : lanes) CHECK(pool.acquire(&lane).ok());
  Lane more;
  const Failure failure = pool.acquire(&more);
  CHECK(failure.status == KVL_NO_RESOURCE && failure.code == 207008);
  CHECK_EQ(pool.in_use(), 6u);
  for (const Lane &lane : lanes) pool.release(lane);
}

void test_callers_stream(const Device &device) {
  const AclApi &acl = device.acl();
  aclrtStream caller = nullptr;
  CHECK(acl.aclrtCreateStream(&caller) == ACL_SUCCESS);
  aclrtEvent event = nullptr;
  CHECK(record_caller(acl, caller, &event).ok());
  CHECK(acl.aclrtDestroyEvent(event) == ACL_SUCCESS);
  CHECK(acl.aclrtDestroyStream(caller) == ACL_SUCCESS);
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  use_simulator(arguments[1], "9.1", {{"CANN_SIM_MAX_STREAMS", "6"}});
  {
    std::unique_ptr<Device> device;
    CHECK(Device::open(0, &device).ok());
    const ContextGuard guard = device->enter();
    test_success(device->acl());
    test_failure_behind_a_complete_event(device->acl());
    test_stuck(device->acl());
    test_exhausted(device->acl());
    test_callers_stream(*device);
  }
  CHECK_EQ(live("stream"), int64_t{0});
  CHECK_EQ(live("event"), int64_t{0});
  std::puts("streams: passed");
  return 0;
}
