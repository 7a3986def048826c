#include "hixl_hccl.h"

#include <dlfcn.h>

#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#include "hixl_status.h"

namespace cann_sim::hixl_sim {
namespace {

// HCCL's initialisation is not safe to call twice at once: one lock a process, destruction included.
std::mutex &init_mutex() {
  static auto &mutex = *new std::mutex;
  return mutex;
}

template <typename Function>
void find(void *library, const char *name, Function *out) {
  *out = reinterpret_cast<Function>(dlsym(library, name));
  if (*out == nullptr) {
    throw Refused(26, static_cast<int>(hixl::kFailed), std::string("libhcomm.so has no ") + name);
  }
}

HcclApi load() {
  void *library = dlopen("libhcomm.so", RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
  if (library == nullptr) {
    throw Refused(26, static_cast<int>(hixl::kFailed), std::string("libhcomm.so can't be loaded: ") + dlerror());
  }
  HcclApi api;
  find(library, "HcclCommInitClusterInfoMemConfig", &api.init);
  find(library, "HcclCommDestroy", &api.destroy);
  find(library, "HcclRegisterGlobalMem", &api.register_memory);
  find(library, "HcclDeregisterGlobalMem", &api.deregister_memory);
  find(library, "HcclCommBindMem", &api.bind);
  find(library, "HcclCommUnbindMem", &api.unbind);
  find(library, "HcclCommPrepare", &api.prepare);
  find(library, "HcclBatchPut", &api.put);
  find(library, "HcclBatchGet", &api.get);
  return api;
}

// Version 5 of the configuration, as the vendor's engine passes it.
HcclCommConfig make_config(const std::string &name, std::uint32_t traffic_class, std::uint32_t service_level) {
  HcclCommConfig config;
  std::memset(&config, 0, sizeof config);
  const std::size_t size = sizeof config;
  const std::uint32_t magic = 0xf0f0f0f0;
  const std::uint32_t version = 5;
  std::memcpy(config.reserved, &size, sizeof size);
  std::memcpy(config.reserved + 8, &magic, sizeof magic);
  std::memcpy(config.reserved + 12, &version, sizeof version);
  config.hcclBufferSize = 200;
  config.hcclDeterministic = 0xffffffff;
  std::strncpy(config.hcclCommName, name.c_str(), sizeof config.hcclCommName - 1);
  config.hcclRdmaTrafficClass = traffic_class;
  config.hcclRdmaServiceLevel = service_level;
  return config;
}

}  // namespace

const HcclApi &hccl_api() {
  static const HcclApi api = load();
  return api;
}

void HcclLink::open(const std::string &name, const Merged &ranks, const std::vector<void *> &memories, int timeout_ms,
                    std::uint32_t traffic_class, std::uint32_t service_level) {
  const HcclApi &api = hccl_api();
  HcclCommConfig config = make_config(name, traffic_class, service_level);
  {
    const std::lock_guard<std::mutex> lock(init_mutex());
    HcclComm made = nullptr;
    check_hccl(api.init(ranks.json.c_str(), ranks.own_rank, &config, &made), "HcclCommInitClusterInfoMemConfig");
    comm_ = made;
  }
  peer_rank_ = ranks.peer_rank;
  try {
    for (void *memory : memories) {
      check_hccl(api.bind(comm_, memory), "HcclCommBindMem");
      bound_.push_back(memory);
    }
    HcclPrepareConfig prepare{};
    check_hccl(api.prepare(comm_, &prepare, (timeout_ms + 999) / 1000), "HcclCommPrepare");
  } catch (const Refused &) {
    close();
    throw;
  }
}

void HcclLink::close() {
  if (comm_ == nullptr) return;
  const HcclApi &api = hccl_api();
  for (void *memory : bound_) api.unbind(comm_, memory);
  bound_.clear();
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (true) {
    {
      const std::lock_guard<std::mutex> lock(init_mutex());
      if (api.destroy(comm_) != HCCL_E_AGAIN) break;
    }
    if (std::chrono::steady_clock::now() > end) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  comm_ = nullptr;
}

}  // namespace cann_sim::hixl_sim
