#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstring>
#include <system_error>
#include <thread>

#include "ascend/wire.h"
#include "link.h"
#include "policy.h"

namespace kvlink::hcomm {
namespace {

constexpr char kExclusionGroup[] = "ascend";
constexpr uint64_t kPollBudgetNs = 300 * 1000;
constexpr uint32_t kAddressToolMs = 5000;
constexpr uint32_t kRegisterMs = 4000;
constexpr uint32_t kShutMs = 1000;
constexpr uint32_t kMaxConnects = 8;  // each holds a thread of the core and one of ours
constexpr uint32_t kMaxLinks = 512;   // each costs about 2 MiB of device memory
constexpr uint32_t kMaxStreams = 512;
constexpr uint64_t kOldDriverHostBytes = uint64_t{20} << 30;  // what drivers before 25.5 can give a NIC access to

// CANN 8.x keeps one table of registered memory a process, which belongs to the first device used.
std::atomic<int32_t> first_device{-1};

Failure refuse_950(const ascend::Device &device) {
  if (device.soc() != ascend::SocFamily::k950) return {};
  return make_failure(
      KVL_UNAVAILABLE, "aclrtGetSocName",
      "%s: HCCL's process-wide memory functions do not exist on Ascend950 (and a batch there has at most "
      "%u descriptors); use channel hixl",
      device.soc_name().c_str(), ascend::kHcclMaxBatch950);
}

Failure claim_device(const ascend::Device &device) {
  if (!device.cann().known() || device.cann().at_least(9, 0)) return {};
  int32_t expected = -1;
  if (first_device.compare_exchange_strong(expected, device.id()) || expected == device.id()) return {};
  return make_failure(KVL_UNSUPPORTED, "engine_open",
                      "npu:%d was used in this process before npu:%d, and CANN %s registers memory for one device a "
                      "process: use a process for each device, or CANN 9.0",
                      expected, device.id(), device.cann().text.c_str());
}

}  // namespace

Failure probe_host() {
  Failure failure = ascend::probe_device();
  if (!failure.ok()) return failure;
  ascend::HcclApi hccl;
  failure = ascend::load_hccl(kPolicy, &hccl);
  if (!failure.ok()) return failure;
  std::unique_ptr<ascend::Device> device;
  failure = ascend::Device::open(0, &device);
  return failure.ok() ? refuse_950(*device) : failure;
}

Failure Engine::Registrar::register_memory(uint64_t address, uint64_t length, bool on_device, void **handle) {
  *handle = nullptr;
  if (!vendor_.global()) return {};
  ascend::InitLock lock;
  const Failure busy =
      ascend::InitLock::acquire("HcclRegisterGlobalMem", {host::now_ns() + uint64_t{kRegisterMs} * 1000000, -1}, &lock);
  if (!busy.ok()) return busy;
  ascend::HcclMem mem{};
  mem.type = on_device ? ascend::HCCL_MEM_TYPE_DEVICE : ascend::HCCL_MEM_TYPE_HOST;
  mem.addr = reinterpret_cast<void *>(address);
  mem.size = length;
  const int code = vendor_.hccl.HcclRegisterGlobalMem(&mem, handle);
  if (code == ascend::HCCL_SUCCESS) return {};
  return ascend::vendor_failure(&vendor_.acl(), ascend::Vendor::kHccl, "HcclRegisterGlobalMem", code,
                                "cannot register %" PRIu64 " bytes of %s memory at %#" PRIx64, length,
                                on_device ? "device" : "host", address);
}

Failure Engine::Registrar::deregister_memory(void *handle) {
  if (!vendor_.global()) return {};
  ascend::InitLock lock;
  const Failure busy = ascend::InitLock::acquire("HcclDeregisterGlobalMem",
                                                 {host::now_ns() + uint64_t{kRegisterMs} * 1000000, -1}, &lock);
  if (!busy.ok()) return busy;
  return hccl_result(vendor_, "HcclDeregisterGlobalMem", vendor_.hccl.HcclDeregisterGlobalMem(handle),
                     "cannot deregister memory");
}

Failure Engine::open(const kvl_engine_params &params, std::shared_ptr<Engine> *engine) {
  std::shared_ptr<Engine> opened(new Engine);
  const Failure failure = opened->start(params);
  if (failure.ok()) *engine = std::move(opened);
  return failure;
}

Failure Engine::start(const kvl_engine_params &params) {
  Failure failure = parse_options(params, &options_);
  int32_t index = 0;
  if (failure.ok()) failure = ascend::parse_device(params.device, &index);
  if (failure.ok()) failure = ascend::apply_link_option(options_.link_option());
  ascend::LinkEnvironment environment;
  if (failure.ok()) failure = ascend::read_link_environment(&environment);
  if (failure.ok()) failure = ascend::check_connect_timeout_environment();
  if (!failure.ok()) return failure;
  intra_roce_ = environment.intra_roce;

  auto vendor = std::make_shared<Vendor>();
  std::unique_ptr<ascend::Device> device;
  failure = ascend::Device::open(index, &device);
  if (!failure.ok()) return failure;
  vendor->device = std::move(device);
  const ascend::Device &npu = *vendor->device;
  failure = refuse_950(npu);
  if (failure.ok()) failure = ascend::load_hccl(kPolicy, &vendor->hccl);
  if (failure.ok()) failure = claim_device(npu);
  if (!failure.ok()) return failure;
  vendor_ = std::move(vendor);
  address_ = ascend::find_device_address(npu.physical_id(), options_.device_ip, kAddressToolMs);
  if (address_.ip.empty() && (intra_roce_ || options_.link_option() == ascend::LinkOption::kRoce)) {
    return ascend::missing_device_address(address_, npu.physical_id(), "engine_open");
  }

  registrar_ = std::make_unique<Registrar>(*vendor_);
  ascend::MemoryRules rules;
  rules.hccs_alignment = options_.link_option() == ascend::LinkOption::kHccs;
  rules.stage_host = options_.host_staging > 0;
  if (npu.cann().known() && !npu.cann().at_least(9, 0)) rules.max_regions = ascend::kHcclMaxRegions8x;
  if (npu.driver().known() && !npu.driver().at_least(25, 5)) rules.max_host_bytes = kOldDriverHostBytes;
  const std::string owner = std::string("kvlink channel ") + kPolicy.provider + " on npu:" + std::to_string(npu.id());
  memory_ = std::make_unique<ascend::Memory>(vendor_->device, *registrar_, rules, owner);
  lanes_ = std::make_unique<ascend::StreamPool>(npu.acl(), kMaxStreams);
  runner_ = std::make_unique<ascend::VendorRunner>(vendor_->device);
  failure = loop_.open();
  if (!failure.ok()) return failure;
  return ascend::StagingArea::open(vendor_->device, options_, *memory_, loop_, completions_, kStagedPath, &staging_);
}

Engine::~Engine() {
  if (vendor_ == nullptr) return;
  const auto guard = vendor_->device->enter();
  staging_.reset();
  lanes_.reset();
  if (memory_ != nullptr) {
    // The core closed every region, but for those that a communicator still held; it is gone by now.
    std::vector<uint32_t> left;
    memory_->regions().each([&left](const auto &region) { left.push_back(region->handle); });
    for (const uint32_t handle : left) static_cast<void>(memory_->close(handle));
  }
  memory_.reset();
}

void Engine::query(kvl_attr *attr) const {
  std::memset(attr, 0, sizeof *attr);
  attr->struct_size = sizeof *attr;
  attr->connect_mode = KVL_CONNECT_BOTH;
  attr->max_connects = kMaxConnects;
  attr->max_links = kMaxLinks;
  attr->caps = KVL_CAP_PUT | KVL_CAP_GET | KVL_CAP_ACCEPTOR_SUBMIT | KVL_CAP_ALLOCATE | KVL_CAP_COPY | KVL_CAP_CANCEL |
               KVL_CAP_INTERRUPT | KVL_CAP_STREAM | KVL_CAP_STATISTICS;
  attr->memory_kinds = 1 << KVL_MEMORY_HOST | 1 << KVL_MEMORY_DEVICE;
  attr->alignment = 1;
  attr->memory_alignment = 1;
  attr->max_describe = sizeof(LinkBlob);
  attr->max_export = sizeof(ascend::RegionBlob);
  std::memcpy(attr->exclusion_group, kExclusionGroup, sizeof kExclusionGroup);
}

void Engine::describe(LinkBlob *blob) const {
  const ascend::Device &device = *vendor_->device;
  std::memset(blob, 0, sizeof *blob);
  blob->magic = LinkBlob::kMagic;
  blob->version = kWireVersion;
  blob->flavour = static_cast<uint32_t>(vendor_->hccl.flavour);
  blob->family = static_cast<uint32_t>(device.soc());
  blob->intra_roce = intra_roce_ ? 1 : 0;
  blob->link_option = static_cast<uint32_t>(options_.link_option());
  blob->device_port = static_cast<uint32_t>(options_.device_port);
  blob->physical_id = device.physical_id();
  const auto chosen = [](uint64_t option, int64_t told) {
    return option == Options::kNotSet ? told : static_cast<int64_t>(option);
  };
  blob->super_device_id = chosen(options_.super_device_id, device.super_device_id());
  blob->super_pod_id = chosen(options_.super_pod_id, device.super_pod_id());
  ascend::put_text(blob->server_id, options_.server_id);
  ascend::put_text(blob->device_ip, address_.ip);
  ascend::put_text(blob->soc, device.soc_name());
  ascend::put_text(blob->cann, device.cann().text);
}

void Engine::add_link(const std::shared_ptr<Link> &link) {
  const std::lock_guard<std::mutex> lock(links_mutex_);
  links_.push_back(link);
  ++links_version_;
}

void Engine::remove_link(const Link *link) {
  const auto io = loop_.lock();
  polled_.clear();  // poll may never come again
  polled_version_ = 0;
  const std::lock_guard<std::mutex> lock(links_mutex_);
  links_.erase(std::remove_if(links_.begin(), links_.end(), [link](const auto &item) { return item.get() == link; }),
               links_.end());
  ++links_version_;
}

void Engine::poll(kvl_completion *completions, uint32_t *count, uint32_t *more) {
  *more = 0;
  {
    const auto io = loop_.lock();
    const auto guard = vendor_->device->enter();
    const uint64_t until = host::now_ns() + kPollBudgetNs;
    loop_.dispatch(until);
    const bool staged = staged_.exchange(false);
    if (work_.load() > 0 || staged) {
      {
        const std::lock_guard<std::mutex> lock(links_mutex_);
        if (polled_version_ != links_version_) {
          polled_ = links_;
          polled_version_ = links_version_;
        }
      }
      for (const std::shared_ptr<Link> &link : polled_) {
        if (link->progress(until)) *more = 1;
        if (link->staged_transfers() > 0) staged_.store(true);
      }
    } else if (!polled_.empty()) {
      polled_.clear();  // a closed link lives no longer than its last transfer
      polled_version_ = 0;
    }
  }
  bool left = false;
  completions_.take(completions, count, &left);
  if (left) *more = 1;
  if (*count > 0) loop_.note_progress();
}

void Engine::wait(uint32_t timeout_ms) { loop_.wait(timeout_ms, work_.load() > 0 || staged_.load()); }

void Engine::spawn(std::function<void()> job) {
  {
    const std::lock_guard<std::mutex> lock(threads_mutex_);
    ++threads_;
  }
  auto self = shared_from_this();
  auto body = [self, job = std::move(job)]() mutable {
    {
      const auto guard = self->vendor_->device->enter();
      job();
      job = nullptr;
    }
    const std::lock_guard<std::mutex> lock(self->threads_mutex_);
    --self->threads_;
    self->threads_changed_.notify_all();
  };
  try {
    std::thread(body).detach();
  } catch (const std::system_error &) {
    body();  // no thread to be had: better late than never
  }
}

void Engine::shut() {
  std::unique_lock<std::mutex> lock(threads_mutex_);
  threads_changed_.wait_for(lock, std::chrono::milliseconds(kShutMs), [this] { return threads_ == 0; });
}

void Engine::statistics(kvl_stat *out, uint32_t *count) const {
  uint64_t staged = 0, served = 0, refused = 0;
  staging_->statistics(&staged, &served, &refused);
  const struct {
    const char *name;
    uint64_t value;
  } values[] = {
      {"put_bytes", stats_.put_bytes.load()},
      {"get_bytes", stats_.get_bytes.load()},
      {"submits", stats_.submits.load()},
      {"batches", stats_.batches.load()},
      {"descriptors", stats_.descriptors.load()},
      {"cancelled", stats_.cancelled.load()},
      {"stream_failures", stats_.stream_failures.load()},
      {"streams_in_use", lanes_->in_use()},
      {"connects", stats_.connects.load()},
      {"connect_retries", stats_.connect_retries.load()},
      {"links_stuck", stats_.links_stuck.load()},
      {"degraded", runner_->degraded() ? 1u : 0u},
      {"calls_abandoned", runner_->abandoned()},
      {"registered_bytes", memory_->registered_bytes()},
      {"staged_bytes", staged},
      {"staged_served_bytes", served},
      {"staging_refused", refused},
  };
  const uint32_t room = *count;
  *count = 0;
  for (const auto &item : values) {
    if (*count == room) break;
    kvl_stat &stat = out[(*count)++];
    ascend::put_text(stat.name, item.name);
    stat.value = item.value;
  }
}

}  // namespace kvlink::hcomm
