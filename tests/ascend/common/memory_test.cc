// Registering memory: the right kind, aligned, once, counted, bound, quarantined, given back.
#include "ascend/memory.h"

#include <cstring>

#include "ascend/common/sim.h"

using namespace kvlink::ascend;
using namespace kvlink::test;

namespace {

bool says(const Failure &failure, const char *text) { return failure.message.find(text) != std::string::npos; }

// Counts what a provider would tell its vendor.
class Vendor : public VendorMemory {
 public:
  Failure register_memory(uint64_t address, uint64_t, bool, void **handle) override {
    if (refuse) return make_failure(KVL_NO_RESOURCE, "HcclRegisterGlobalMem", "refused");
    *handle = reinterpret_cast<void *>(address + 1);
    ++registered;
    return {};
  }
  Failure deregister_memory(void *handle) override {
    CHECK(handle != nullptr);
    --registered;
    return {};
  }
  int registered = 0;
  bool refuse = false;
};

kvl_mem_desc desc(uint32_t kind, uint64_t address, uint64_t length, uint32_t access = 3) {
  kvl_mem_desc out{};
  out.struct_size = sizeof out;
  out.kind = kind;
  out.device = kind == KVL_MEMORY_DEVICE ? 0 : -1;
  out.access = access;
  out.address = address;
  out.length = length;
  return out;
}

void test_checks(const std::shared_ptr<const Device> &device) {
  Vendor vendor;
  MemoryRules rules;
  rules.hccs_alignment = true;
  Memory memory(device, vendor, rules, "the test");
  uint64_t address = 0, host = 0;
  CHECK(memory.allocate(KVL_MEMORY_DEVICE, 3 * kHugePage, &address).ok());
  CHECK(memory.allocate(KVL_MEMORY_HOST, 5000, &host).ok());
  CHECK(address % kHugePage == 0 && host % 4096 == 0);
  CHECK(says(memory.open(1, desc(KVL_MEMORY_DEVICE, address + 4096, 4096)), "2 MiB"));
  CHECK(says(memory.open(1, desc(KVL_MEMORY_HOST, address, 4096)), "device memory"));
  CHECK(says(memory.open(1, desc(KVL_MEMORY_DEVICE, host, 4096)), "host memory"));
  kvl_mem_desc other = desc(KVL_MEMORY_DEVICE, address, 4096);
  other.device = 1;
  CHECK(says(memory.open(1, other), "npu:1"));
  CHECK(memory.open(1, desc(KVL_MEMORY_HOST, 0, 10)).status == KVL_INVALID);
  CHECK(memory.open(1, desc(KVL_MEMORY_HOST, host, 0)).status == KVL_INVALID);
  CHECK(memory.open(1, desc(KVL_MEMORY_HOST, UINT64_MAX - 5, 10)).status == KVL_INVALID);
  CHECK(memory.open(1, desc(KVL_MEMORY_HOST, host, 10, 4)).status == KVL_INVALID);
  CHECK(memory.open(1, desc(2, host, 10)).status == KVL_UNSUPPORTED);
  CHECK_EQ(vendor.registered, 0);
  CHECK(memory.open(1, desc(KVL_MEMORY_DEVICE, address, kHugePage)).ok());
  CHECK(memory.open(1, desc(KVL_MEMORY_DEVICE, address + kHugePage, kHugePage)).status == KVL_STATE);
  CHECK_EQ(vendor.registered, 1);
  CHECK(says(memory.open(2, desc(KVL_MEMORY_DEVICE, address, kHugePage / 2)), "the test"));
  vendor.refuse = true;
  CHECK(memory.open(2, desc(KVL_MEMORY_DEVICE, address + kHugePage, 64)).status == KVL_NO_RESOURCE);
  vendor.refuse = false;
  CHECK(memory.open(2, desc(KVL_MEMORY_DEVICE, address + kHugePage, 64)).ok());
  CHECK_EQ(memory.registered_bytes(), kHugePage + 64);
  CHECK(memory.close(2).ok() && memory.close(1).ok());
  CHECK(memory.close(1).status == KVL_INVALID);
  CHECK_EQ(vendor.registered, 0);
  memory.free(address);
  memory.free(address);  // the core does not, but it must not end in a double free
  memory.free(host);
}

void test_copy(const std::shared_ptr<const Device> &device) {
  Vendor vendor;
  Memory memory(device, vendor, {}, "the test");
  for (const uint32_t kind : {KVL_MEMORY_DEVICE, KVL_MEMORY_HOST}) {
    uint64_t address = 0;
    CHECK(memory.allocate(kind, 10000, &address).ok());
    CHECK(memory.open(7, desc(kind, address, 10000)).ok());
    std::vector<uint8_t> out(500), back(500, 1);
    CHECK(memory.copy(7, 9500, back.data(), 500, false).ok());
    CHECK(back == out);  // new memory is zeroed
    fill(out.data(), out.size(), kind);
    CHECK(memory.copy(7, 9500, out.data(), 500, true).ok());
    CHECK(memory.copy(7, 9500, back.data(), 500, false).ok());
    CHECK(back == out);
    CHECK(memory.copy(7, 9501, back.data(), 500, false).status == KVL_INVALID);
    CHECK(memory.copy(7, UINT64_MAX, back.data(), 500, false).status == KVL_INVALID);
    CHECK(memory.copy(8, 0, back.data(), 1, false).status == KVL_INVALID);
    CHECK(memory.close(7).ok());
    memory.free(address);
  }
}

void test_bindings_and_quarantine(const std::shared_ptr<const Device> &device) {
  Vendor vendor;
  Memory memory(device, vendor, {}, "the test");
  uint64_t address = 0;
  CHECK(memory.allocate(KVL_MEMORY_DEVICE, 2 * kHugePage, &address).ok());
  CHECK(memory.open(1, desc(KVL_MEMORY_DEVICE, address, kHugePage)).ok());
  Bindings link = memory.bind();
  CHECK_EQ(link.regions().size(), size_t{1});
  CHECK(memory.open(2, desc(KVL_MEMORY_DEVICE, address + kHugePage, kHugePage)).ok());
  CHECK(memory.regions().get(2)->sequence > link.sequence());  // later than the link: "reconnect"
  CHECK(memory.regions().get(1)->sequence <= link.sequence());
  CHECK(memory.close(1).status == KVL_BUSY);
  Bindings second = memory.bind();
  CHECK_EQ(second.regions().size(), size_t{2});
  Bindings moved = std::move(link);
  second.drop();
  CHECK(memory.close(1).status == KVL_BUSY);
  moved = Bindings();
  const uint64_t held = memory.quarantine().add(address + 100, 10, "a transfer passed its deadline");
  CHECK(says(memory.close(1), "passed its deadline"));
  CHECK(memory.close(2).ok());
  memory.free(address);  // kept: something may still write to it
  CHECK_EQ(live("device_memory"), int64_t{1});
  memory.quarantine().release(held);
  CHECK(memory.close(1).ok());
  memory.free(address);
  CHECK_EQ(live("device_memory"), int64_t{0});
}

void test_staged_and_limited(const std::shared_ptr<const Device> &device) {
  Vendor vendor;
  MemoryRules rules;
  rules.stage_host = true;
  rules.max_regions = 2;
  rules.max_host_bytes = 8192;
  Memory memory(device, vendor, rules, "the test");
  std::vector<char> plain(1 << 20);
  CHECK(memory.open(1, desc(KVL_MEMORY_HOST, reinterpret_cast<uint64_t>(plain.data()) + 3, 5000)).ok());
  CHECK(memory.regions().get(1)->staged);
  CHECK_EQ(vendor.registered, 0);
  CHECK(memory.bind().regions().empty());
  RegionBlob blob;
  uint64_t room = sizeof blob;
  CHECK(memory.describe(1, &blob, &room).ok());
  CHECK(blob.staged == 1 && blob.length == 5000);
  uint64_t host = 0;
  CHECK(memory.allocate(KVL_MEMORY_HOST, 3 * 4096, &host).ok());
  CHECK(memory.open(2, desc(KVL_MEMORY_HOST, host, 4096)).ok());
  CHECK(!memory.regions().get(2)->staged);
  CHECK(says(memory.open(3, desc(KVL_MEMORY_HOST, host + 4096, 8192)), "host_staging"));
  CHECK(memory.open(3, desc(KVL_MEMORY_HOST, host + 4096, 4096)).ok());
  CHECK(says(memory.open(4, desc(KVL_MEMORY_HOST, host + 8192, 64)), "2 regions"));
  for (const uint32_t handle : {1u, 2u, 3u}) CHECK(memory.close(handle).ok());
  memory.free(host);
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  use_simulator(arguments[1], "9.1");
  {
    std::unique_ptr<Device> opened;
    CHECK(Device::open(0, &opened).ok());
    const std::shared_ptr<const Device> device = std::move(opened);
    test_checks(device);
    test_copy(device);
    test_bindings_and_quarantine(device);
    test_staged_and_limited(device);
  }
  CHECK_EQ(live("device_memory"), int64_t{0});
  CHECK_EQ(live("host_memory"), int64_t{0});
  CHECK_EQ(Registry::process().size(), size_t{0});
  std::puts("memory: passed");
  return 0;
}
