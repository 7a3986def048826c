// What a person reads when a vendor library cannot be used. Each case runs in a process of its own: what is loaded
// stays.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "ascend/common/sim.h"
#include "ascend/device.h"
#include "ascend/hccl.h"
#include "ascend/runner.h"

using namespace kvlink::ascend;
using namespace kvlink::test;

namespace {

void in_child(const char *name, const std::function<void()> &body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    body();
    std::fflush(nullptr);
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    std::fprintf(stderr, "case '%s' failed\n", name);
    std::exit(1);
  }
}

void expect(const Failure &failure, kvl_status status, std::initializer_list<const char *> parts) {
  CHECK_EQ(failure.status, status);
  for (const char *part : parts) {
    if (failure.message.find(part) != std::string::npos) continue;
    std::fprintf(stderr, "'%s' is not in: %s\n", part, failure.message.c_str());
    std::exit(1);
  }
  CHECK(failure.message.size() < sizeof(kvl_error::message));
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  const std::string libs = arguments[1];
  for (const char *variable : {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "KVLINK_ASCEND_SYSROOT"}) unsetenv(variable);

  in_child("no toolkit", [] {
    setenv("KVLINK_ASCEND_SYSROOT", "/nonexistent", 1);
    expect(probe_device(), KVL_UNAVAILABLE, {"libascendcl.so", "no CANN toolkit was found", "ASCEND_HOME_PATH"});
  });
  in_child("wrong toolkit", [] {
    setenv("ASCEND_HOME_PATH", "/nonexistent/cann", 1);
    expect(probe_device(), KVL_UNAVAILABLE, {"ASCEND_HOME_PATH is '/nonexistent/cann'", "does not exist"});
  });
  in_child("toolkit without its libraries", [] {
    char folder[] = "/tmp/kvlink-loading-XXXXXX";
    CHECK(mkdtemp(folder) != nullptr);
    setenv("ASCEND_HOME_PATH", folder, 1);
    expect(probe_device(), KVL_UNAVAILABLE, {"libascendcl.so", "lacks it"});
    FILE *script = std::fopen((std::string(folder) + "/set_env.sh").c_str(), "w");
    CHECK(script != nullptr);
    std::fclose(script);
    expect(probe_device(), KVL_UNAVAILABLE, {"source ", "set_env.sh"});
    CHECK(unlink((std::string(folder) + "/set_env.sh").c_str()) == 0 && rmdir(folder) == 0);
  });
  in_child("from the toolkit's folder alone", [&] {
    // Nothing in LD_LIBRARY_PATH: the toolkit's own lib64 is where it is found.
    char folder[] = "/tmp/kvlink-loading-XXXXXX";
    CHECK(mkdtemp(folder) != nullptr);
    const std::string lib64 = std::string(folder) + "/lib64";
    CHECK(symlink((libs + "/9.1").c_str(), lib64.c_str()) == 0);
    setenv("ASCEND_HOME_PATH", folder, 1);
    const Failure failure = probe_device();
    CHECK(unlink(lib64.c_str()) == 0 && rmdir(folder) == 0);
    if (!failure.ok()) std::fprintf(stderr, "%s\n", failure.message.c_str());
    CHECK(failure.ok());
  });
  in_child("link-time stubs", [&] {
    use_simulator(libs, "devlib");
    expect(probe_device(), KVL_UNAVAILABLE, {"driver", "/usr/local/Ascend/driver"});
  });
  in_child("no device", [&] {
    use_simulator(libs, "9.1", {{"ASCEND_RT_VISIBLE_DEVICES", "9"}});
    CHECK_EQ(probe_device().status, KVL_UNAVAILABLE);
  });
  in_child("wrong device id", [&] {
    use_simulator(libs, "9.1");
    std::unique_ptr<Device> device;
    expect(Device::open(5, &device), KVL_INVALID, {"npu:5 does not exist", "2 NPU", "ASCEND_RT_VISIBLE_DEVICES"});
  });
  in_child("hccl's functions in libhccl before 8.5", [&] {
    setenv("KVLINK_ASCEND_SYSROOT", "/nonexistent", 1);
    use_simulator(libs, "8.3");
    CHECK(dlopen((libs + "/8.3/libhccl.so").c_str(), RTLD_NOW) != nullptr);
    HcclApi api;
    CHECK(load_hccl(kHcclPolicy, &api).ok());
    CHECK(api.library.name() == "libhccl.so" && api.HcclBatchPut != nullptr);
    expect(load_hccl(kHcommOnesidedPolicy, &api), KVL_UNAVAILABLE, {"hcomm_onesided needs CANN 8.5", "libhcomm.so"});
  });
  in_child("hccl's functions in libhcomm from 8.5 on", [&] {
    use_simulator(libs, "8.5.0");
    CHECK(dlopen((libs + "/8.5.0/libhcomm.so").c_str(), RTLD_NOW) != nullptr);
    HcclApi api;
    CHECK(load_hccl(kHcommOnesidedPolicy, &api).ok());
    CHECK(api.library.name() == "libhcomm.so" && api.flavour == HcclFlavour::kGlobal);
    CHECK(api.HcclCommPrepare != nullptr);
  });
  in_child("a missing symbol", [&] {
    Library library;
    CHECK(Library::open("libc.so.6", Library::Scope::kLocal, &library).ok());
    CHECK(library.find("printf") != nullptr && library.find("HcclBatchPut") == nullptr);
    expect(missing_symbols(library, {"HcclBatchPut", "HcclBatchGet", "HcclCommPrepare", "HcclCommBindMem"}, "8.5"),
           KVL_UNAVAILABLE,
           {"libc.so.6", "HcclBatchPut, HcclBatchGet, HcclCommPrepare and 1 more", "CANN 8.5", "upgrade"});
    CHECK(!own_directory().empty());
  });
  for (const char *flavour : {"8.3", "8.5.0", "9.0", "9.1"}) {
    in_child(flavour, [&] {
      use_simulator(libs, flavour, {{"CANN_SIM_PHYSICAL_IDS", "5"}, {"CANN_SIM_DEVICES", "1"}});
      std::unique_ptr<Device> device;
      const Failure failure = Device::open(0, &device);
      if (!failure.ok()) std::fprintf(stderr, "%s: %s\n", flavour, failure.message.c_str());
      CHECK(failure.ok());
      CHECK_EQ(device->physical_id(), 5);
      CHECK(device->soc() == SocFamily::kA2);
      const ContextGuard guard = device->enter();
      void *memory = nullptr;
      char plain[64];
      CHECK(allocate_device(device->acl(), 64, &memory).ok());
      CHECK(pointer_kind(device->acl(), memory) == PointerKind::kDevice);
      CHECK(pointer_kind(device->acl(), plain) == PointerKind::kHost);
      CHECK(device->acl().aclrtFree(memory) == ACL_SUCCESS);
    });
  }
  in_child("a hung vendor call holds up neither its caller nor the end of the process", [&] {
    use_simulator(libs, "9.1");
    set_faults("aclrtCreateStream=hang");
    std::unique_ptr<Device> opened;
    CHECK(Device::open(0, &opened).ok());
    const std::shared_ptr<const Device> device = std::move(opened);
    const uint64_t before = kvlink::host::now_ns();
    {
      VendorRunner runner(device);
      const Failure failure = runner.run("aclrtCreateStream", {before + 200000000, -1}, [device] {
        aclrtStream stream = nullptr;
        static_cast<void>(device->acl().aclrtCreateStream(&stream));
        return Failure{};
      });
      CHECK(failure.status == KVL_TIMEOUT && runner.degraded());
    }
    CHECK(kvlink::host::now_ns() - before < uint64_t{5} * 1000000000);
    alarm(5);      // SIGALRM ends the child badly when exit takes longer
    std::exit(0);  // with every destructor and exit handler, as an interpreter ends
  });
  std::puts("loading: passed");
  return 0;
}
