#include "engine.h"

#include <algorithm>
#include <cstring>

#include "ascend/wire.h"
#include "link.h"
#include "link_blob.h"

namespace kvlink::hixl_provider {
namespace {

using host::Deadline;
using host::now_ns;

constexpr uint64_t kMillisecond = 1000000;
constexpr uint64_t kPollBudgetNs = 300 * 1000;
constexpr uint64_t kInitializeNs = 60000 * kMillisecond;
constexpr uint64_t kFinalizeNs = 1000 * kMillisecond;  // then it goes on without us
constexpr uint32_t kAddressToolMs = 3000;
constexpr int kPortAttempts = 16;
constexpr uint64_t kRegionsBefore90 = 256;
constexpr uint64_t kHostLimitOldDriver = uint64_t{20} << 30;

// A port that nobody has right now. Another process may be quicker: then the next one is tried.
Failure free_port(const std::string &address, uint16_t wanted, uint16_t *port) {
  host::UniqueFd listener;
  return host::listen_tcp(address, wanted, &listener, port);
}

std::string engine_name(const std::string &address, uint16_t port) {
  const bool ipv6 = address.find(':') != std::string::npos;
  return (ipv6 ? "[" + address + "]" : address) + ":" + std::to_string(port);
}

}  // namespace

Failure Engine::open(const kvl_engine_params &params, std::unique_ptr<Engine> *out) {
  std::unique_ptr<Engine> engine(new Engine);
  const Failure failure = engine->start(params);
  if (failure.ok()) *out = std::move(engine);
  return failure;
}

Failure Engine::start(const kvl_engine_params &params) {
  Failure failure = parse_settings(params, &settings_);
  if (failure.ok()) failure = load_vendor(&shim_);
  if (failure.ok()) failure = ascend::check_connect_timeout_environment();
  if (failure.ok()) failure = ascend::apply_link_option(settings_.link_option());
  if (failure.ok()) failure = ascend::read_link_environment(&environment_);
  if (!failure.ok()) return failure;
  std::unique_ptr<ascend::Device> device;
  failure = ascend::Device::open(settings_.device, &device);
  if (!failure.ok()) return failure;
  device_ = std::move(device);
  address_ = ascend::find_device_address(device_->physical_id(), "", kAddressToolMs);
  if (settings_.link_option() == ascend::LinkOption::kRoce && address_.ip.empty()) {
    return make_failure(
        KVL_UNAVAILABLE, "engine_open",
        "a RoCE link needs the address (device_ip) of NPU %d (physical id), which HIXL looks up itself, and "
        "none was found; tried %s: mount /etc/hccn.conf or hccn_tool",
        device_->physical_id(), address_.tried.c_str());
  }
  failure = loop_.open();
  if (!failure.ok()) return failure;
  connector_ = std::make_unique<ascend::VendorRunner>(device_);
  closer_ = std::make_unique<ascend::VendorRunner>(device_);
  failure = serve();
  if (!failure.ok()) return failure;
  vendor_memory_ = std::make_unique<HixlMemory>(hixl_);
  memory_ = std::make_unique<ascend::Memory>(device_, *vendor_memory_, memory_rules(),
                                             "hixl channel " + name_ + " on npu:" + std::to_string(settings_.device));
  failure = drop_anchor();
  if (!failure.ok()) return failure;
  return ascend::StagingArea::open(device_, settings_, *memory_, loop_, completions_, kPathStaged, &staging_);
}

// When a process's last registered region goes, HCCL closes the NIC under the links that are still alive. So that this
// never is a region of the user's, each engine keeps one of its own, two MiB of device memory, until it is finalized.
Failure Engine::drop_anchor() {
  uint64_t address = 0;
  const Failure failure = memory_->allocate(KVL_MEMORY_DEVICE, ascend::kHugePage, &address);
  if (!failure.ok()) return failure;
  return memory_->open_internal(address, ascend::kHugePage, &anchor_, KVL_MEMORY_DEVICE);
}

Failure Engine::serve() {
  if (settings_.engine_port != 0) return serve_at(static_cast<uint16_t>(settings_.engine_port));
  Failure failure;
  for (int attempt = 0; attempt < kPortAttempts; ++attempt) {
    uint16_t port = 0;
    failure = free_port(settings_.engine_host, 0, &port);
    if (!failure.ok()) return failure;
    failure = serve_at(port);
    if (failure.ok() || failure.code != kFailed) return failure;
    // The vendor says the same for a taken port and for anything else: only the port itself can tell.
    if (free_port(settings_.engine_host, port, &port).ok()) return failure;
  }
  return failure;
}

Failure Engine::serve_at(uint16_t port) {
  name_ = engine_name(settings_.engine_host, port);
  const std::string traffic_class = std::to_string(settings_.rdma_traffic_class);
  const std::string service_level = std::to_string(settings_.rdma_service_level);
  struct Call {
    std::shared_ptr<HixlEngine> hixl;
    std::vector<std::pair<std::string, std::string>> options;
    std::string name;
  };
  auto call = std::make_shared<Call>();
  call->hixl = std::make_shared<HixlEngine>(shim_, device_);
  call->name = name_;
  // No bounce buffers: with them the vendor copies what is not registered, silently and through memory of its own.
  call->options.emplace_back("BufferPool", "0:0");
  if (settings_.rdma_traffic_class != kUnset) call->options.emplace_back("RdmaTrafficClass", traffic_class);
  if (settings_.rdma_service_level != kUnset) call->options.emplace_back("RdmaServiceLevel", service_level);
  const Deadline deadline{now_ns() + kInitializeNs, -1};
  Failure failure = connector_->run("Hixl::Initialize", deadline, [call] {
    std::vector<kvlink_hixl_option> options;
    for (const auto &[key, value] : call->options) options.push_back({key.c_str(), value.c_str()});
    return call->hixl->initialize(call->name, options.data(), static_cast<uint32_t>(options.size()));
  });
  if (failure.ok()) {
    hixl_ = call->hixl;
  } else if (settings_.engine_port != 0) {
    failure.message += " (option engine_port=" + std::to_string(port) + ": is the port taken?)";
  }
  return failure;
}

ascend::MemoryRules Engine::memory_rules() const {
  ascend::MemoryRules rules;
  rules.hccs_alignment = settings_.link_option() == ascend::LinkOption::kHccs;
  rules.stage_host = settings_.host_staging != 0;
  if (device_->cann().known() && !device_->cann().at_least(9, 0)) rules.max_regions = kRegionsBefore90;
  rules.max_host_bytes = settings_.host_limit;
  if (settings_.host_limit == 0 && device_->driver().known() && !device_->driver().at_least(25, 5)) {
    rules.max_host_bytes = kHostLimitOldDriver;
  }
  return rules;
}

namespace {

// What is left of an engine while it is finalized. Finalize runs when the last one who may be inside a vendor call lets
// go: a call that was given up keeps a hold of its own. Only then can nothing reach the memory any more.
struct Remains {
  std::shared_ptr<HixlEngine> hixl;
  std::unique_ptr<HixlMemory> vendor_memory;
  std::unique_ptr<ascend::Memory> memory;
  std::shared_ptr<ascend::Region> anchor;

  void dispose() {
    const std::weak_ptr<HixlEngine> watched = hixl;
    hixl.reset();
    if (!watched.expired()) {
      // It lives on inside a call that hangs, and may still move bytes: its memory stays with it.
      static_cast<void>(memory.release());
      static_cast<void>(vendor_memory.release());
      return;
    }
    std::vector<uint32_t> left;
    memory->regions().each([&left](const std::shared_ptr<ascend::Region> &region) { left.push_back(region->handle); });
    for (const uint32_t handle : left) static_cast<void>(memory->close(handle));
    if (anchor != nullptr) static_cast<void>(memory->close_internal(anchor));
    memory.reset();
  }
};

}  // namespace

Engine::~Engine() {
  staging_.reset();
  if (!events_.empty()) {
    const ascend::ContextGuard guard = device_->enter();
    for (const ascend::aclrtEvent event : events_) static_cast<void>(device_->acl().aclrtDestroyEvent(event));
  }
  if (hixl_ == nullptr || memory_ == nullptr) return;
  vendor_memory_->finalized();
  auto remains = std::make_shared<Remains>();
  remains->hixl = std::move(hixl_);
  remains->vendor_memory = std::move(vendor_memory_);
  remains->memory = std::move(memory_);
  remains->anchor = std::move(anchor_);
  static_cast<void>(closer_->run("Hixl::Finalize", Deadline{now_ns() + kFinalizeNs, -1}, [remains] {
    remains->dispose();
    return Failure{};
  }));
}

void Engine::free_memory(uint64_t address) {
  if (!vendor_memory_->covers(address)) memory_->free(address);
}

void Engine::query(kvl_attr *attr) const {
  attr->connect_mode = KVL_CONNECT_BOTH;
  attr->max_connects = kMostConnects;
  attr->max_links = kMostLinks;
  attr->caps = KVL_CAP_PUT | KVL_CAP_GET | KVL_CAP_ACCEPTOR_SUBMIT | KVL_CAP_ALLOCATE | KVL_CAP_COPY | KVL_CAP_CANCEL |
               KVL_CAP_INTERRUPT | KVL_CAP_STREAM | KVL_CAP_STATISTICS;
  attr->memory_kinds = 1u << KVL_MEMORY_HOST | 1u << KVL_MEMORY_DEVICE;
  attr->alignment = 1;
  attr->memory_alignment = 1;
  attr->max_ranges = 0;
  attr->max_range_bytes = 0;
  attr->max_describe = sizeof(LinkBlob);
  attr->max_export = sizeof(ascend::RegionBlob);
  ascend::put_text(attr->exclusion_group, "ascend");
}

Failure Engine::open_memory(uint32_t mem, const kvl_mem_desc &desc) {
  Failure failure = memory_->open(mem, desc);
  if (!failure.ok()) return failure;
  const std::shared_ptr<ascend::Region> region = memory_->regions().get(mem);
  if (region == nullptr || region->vendor == nullptr || vendor_memory_->owns(region->vendor)) return failure;
  static_cast<void>(memory_->close(mem));
  return make_failure(KVL_INVALID, "mem_open",
                      "this memory is registered by another hixl channel of this process, and each vendor engine knows "
                      "only what it registered itself: use one channel for it");
}

void Engine::introduce(LinkBlob *blob, uint64_t sequence) const {
  blob->magic = LinkBlob::kMagic;
  blob->version = kWireVersion;
  blob->soc = static_cast<uint32_t>(device_->soc());
  blob->link_option = static_cast<uint32_t>(settings_.link_option());
  blob->intra_roce = environment_.intra_roce ? 1 : 0;
  blob->device = device_->physical_id();
  blob->super_pod = device_->super_pod_id();
  blob->sequence = sequence;
  blob->has_device_address = address_.ip.empty() ? 0 : 1;
  ascend::put_text(blob->engine, name_);
  ascend::put_text(blob->server, settings_.engine_host);
  ascend::put_text(blob->cann, device_->cann().known() ? device_->cann().text : "");
  ascend::put_text(blob->soc_name, device_->soc_name());
}

void Engine::remove_link(Link *link) { links_.erase(std::remove(links_.begin(), links_.end(), link), links_.end()); }

void Engine::retire_event(ascend::aclrtEvent event) {
  events_.push_back(event);
  reap_events();
}

void Engine::reap_events() {
  const ascend::AclApi &acl = device_->acl();
  for (size_t i = 0; i < events_.size();) {
    ascend::aclrtEventRecordedStatus status = ascend::ACL_EVENT_RECORDED_STATUS_NOT_READY;
    const ascend::aclError code = acl.aclrtQueryEventStatus(events_[i], &status);
    if (code == ascend::ACL_SUCCESS && status == ascend::ACL_EVENT_RECORDED_STATUS_NOT_READY) {
      ++i;
      continue;
    }
    static_cast<void>(acl.aclrtDestroyEvent(events_[i]));
    events_[i] = events_.back();
    events_.pop_back();
  }
}

Failure Engine::poll(kvl_completion *completions, uint32_t *count, uint32_t *more) {
  bool again = false;
  const std::thread::id thread = thread_.load(std::memory_order_relaxed);
  // Another thread's poll only hands out what is finished: the vendor's calls are the engine's thread's.
  if (thread == std::thread::id{} || thread == std::this_thread::get_id()) {
    const auto lock = loop_.lock();
    const ascend::ContextGuard guard = device_->enter();
    if (!guard.ok()) {
      Failure failure = guard.failure();
      failure.status = KVL_ENGINE_DOWN;
      return failure;
    }
    const uint64_t until = now_ns() + kPollBudgetNs;
    loop_.dispatch(until);
    if (!events_.empty()) reap_events();
    bool in_flight = false;
    for (Link *link : links_) {
      again = link->progress(until) || again;
      in_flight = link->in_flight() || in_flight;
    }
    in_flight_.store(in_flight, std::memory_order_relaxed);
  }
  bool left = false;
  completions_.take(completions, count, &left);
  if (*count > 0) loop_.note_progress();
  *more = again || left ? 1 : 0;
  return {};
}

void Engine::wait(uint32_t timeout_ms) {
  thread_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  if (!completions_.empty()) return;
  loop_.wait(timeout_ms, in_flight_.load(std::memory_order_relaxed));
}

void Engine::statistics(kvl_stat *out, uint32_t *count) const {
  uint64_t staged = 0, served = 0, refused = 0;
  staging_->statistics(&staged, &served, &refused);
  const std::pair<const char *, uint64_t> values[] = {
      {"put_bytes", stats_.put_bytes},
      {"get_bytes", stats_.get_bytes},
      {"requests", stats_.requests},
      {"descriptors", stats_.descriptors},
      {"connects", stats_.connects},
      {"connect_retries", stats_.connect_retries},
      {"disconnects", stats_.disconnects},
      {"links_lost", stats_.links_lost},
      {"out_of_streams", stats_.out_of_streams},
      {"deferred_by_stream", stats_.deferred},
      {"late_memory_refused", stats_.late_memory_refused},
      {"staged_bytes", staged},
      {"staging_served_bytes", served},
      {"staging_refused", refused},
      {"registered_bytes", memory_->registered_bytes()},
      {"quarantined_bytes", memory_->quarantine().bytes()},
      {"abandoned_calls", connector_->abandoned() + closer_->abandoned()},
      {"degraded", connector_->degraded() ? 1u : 0u},
  };
  uint32_t filled = 0;
  for (const auto &[name, value] : values) {
    if (filled == *count) break;
    kvl_stat &stat = out[filled++];
    std::memset(&stat, 0, sizeof stat);
    ascend::put_text(stat.name, name);
    stat.value = value;
  }
  *count = filled;
}

}  // namespace kvlink::hixl_provider
