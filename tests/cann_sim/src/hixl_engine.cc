#include "hixl_engine.h"

#include <algorithm>
#include <atomic>

#include "hixl_pool.h"
#include "hixl_status.h"
#include "sim.h"

namespace cann_sim::hixl_sim {
namespace {

constexpr int kMaxStreams = 512;
constexpr std::uint32_t kHugeOnly = 1;

std::atomic<int> &live() {
  static auto &count = *new std::atomic<int>(0);
  return count;
}

void watch_finalize() {
  static std::once_flag once;
  std::call_once(once, [] {
    at_finalize([] {
      if (live() > 0) violation(33, "aclFinalize while %d HIXL engines are initialised", live().load());
    });
  });
}

[[noreturn]] void refuse(int rule, hixl::Status status, const std::string &text) {
  throw Refused(rule, static_cast<int>(status), text);
}

void check_timeout(std::int32_t timeout_ms) {
  if (timeout_ms <= 0)
    refuse(26, hixl::kParamInvalid, "timeout " + std::to_string(timeout_ms) + " ms, must be above 0");
}

}  // namespace

int live_engines() { return live(); }

std::int64_t Engine::heartbeat_ms() { return static_cast<std::int64_t>(10000 * settings().time_scale); }
std::int64_t Engine::silence_ms() { return static_cast<std::int64_t>(120000 * settings().time_scale); }

void Engine::need_initialized() const {
  if (initialized_) return;
  // In 8.5 the flag survives Finalize, and what follows is undefined.
  if (finalized_ && flavour().number < 900) violation(30, "a HIXL engine is used after Finalize");
  refuse(26, hixl::kFailed, finalized_ ? "the engine was finalized" : "the engine is not initialized");
}

void Engine::initialize(const std::string &name, const std::map<ge::AscendString, ge::AscendString> &options) {
  if (initialized_) {
    if (flavour().number < 910) return;  // ignored
    refuse(26, hixl::kFailed, "the engine is initialized already");
  }
  const auto address = parse_engine(name);
  if (!address) refuse(26, hixl::kParamInvalid, "local engine \"" + name + "\" is no ip:port, ip or [ip6]:port");
  const Options read = read_options(options);
  const int device = current_device();
  if (device < 0) refuse(4, kRtContextNull, "Initialize: this thread has no device (107002)");
  hccl_api();
  options_ = read;
  name_ = name;
  address_ = *address;
  fragment_ = local_fragment(address_.ip, device);
  context_ = create_context(device);
  if (!context_) refuse(26, hixl::kFailed, "no context of its own");
  const ScopedContext in(context_);
  try {
    allocate_pool();
    if (address_.port > 0) server_ = std::make_unique<Server>(this, address_);
  } catch (const Refused &) {
    release_pool();
    destroy_context(context_->handle);
    throw;
  }
  transfers_ = std::make_unique<Transfers>(kMaxStreams);
  stopping_ = false;
  beat_thread_ = std::thread([this] { beat(); });
  initialized_ = true;
  finalized_ = false;
  ++live();
  count_live("hixl_engine", 1);
  watch_finalize();
}

void Engine::allocate_pool() {
  if (options_.pool_bytes() == 0) return;
  const std::uint64_t bytes = 2 * options_.pool_bytes();
  check_acl(device_malloc(context_->device, bytes, kHugeOnly, &pool_), "aclrtMalloc of the buffer pool");
  const HcclMem mem{HCCL_MEM_TYPE_DEVICE, pool_, bytes};
  check_hccl(hccl_api().register_memory(&mem, &pool_handle_), "HcclRegisterGlobalMem of the buffer pool");
}

void Engine::release_pool() {
  if (pool_handle_ != nullptr) hccl_api().deregister_memory(pool_handle_);
  if (pool_ != nullptr) device_free(pool_);
  pool_handle_ = nullptr;
  pool_ = nullptr;
}

void Engine::finalize() {
  if (!initialized_) return;
  {
    const std::lock_guard<std::mutex> lock(beat_mutex_);
    stopping_ = true;
  }
  beat_stop_.notify_all();
  beat_thread_.join();
  {
    const ScopedContext in(context_);
    std::map<std::string, ChannelPtr> channels;
    {
      const std::lock_guard<std::mutex> lock(channels_mutex_);
      channels.swap(channels_);
    }
    for (const auto &[peer, channel] : channels) close_channel(channel);
    server_.reset();
    transfers_.reset();
    for (const auto &[handle, memory] : memories_) hccl_api().deregister_memory(handle);
    memories_.clear();
    release_pool();
  }
  destroy_context(context_->handle);
  context_.reset();
  initialized_ = false;
  finalized_ = true;
  --live();
  count_live("hixl_engine", -1);
}

void *Engine::register_memory(std::uint64_t start, std::uint64_t bytes, hixl::MemType type) {
  if (start == 0 || bytes == 0 || start + bytes < start) {
    refuse(26, hixl::kParamInvalid, "RegisterMem: address 0, length 0 or a range that wraps");
  }
  const HcclMem mem{static_cast<HcclMemType>(type), reinterpret_cast<void *>(start), bytes};
  void *handle = nullptr;
  check_hccl(hccl_api().register_memory(&mem, &handle), "HcclRegisterGlobalMem");
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  memories_[handle] = {start, bytes, type};
  return handle;
}

void Engine::deregister_memory(void *handle) {
  if (handle == nullptr) refuse(30, hixl::kParamInvalid, "DeregisterMem: the handle is null");
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  const auto found = memories_.find(handle);
  if (found == memories_.end()) return;  // unknown: success
  check_hccl(hccl_api().deregister_memory(handle), "HcclDeregisterGlobalMem");
  memories_.erase(found);
}

std::vector<void *> Engine::memory_handles() {
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  std::vector<void *> handles;
  for (const auto &[handle, memory] : memories_) handles.push_back(handle);
  if (pool_handle_ != nullptr) handles.push_back(pool_handle_);
  return handles;
}

std::vector<Range> Engine::memory_ranges() {
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  std::vector<Range> ranges;
  for (const auto &[handle, memory] : memories_) ranges.push_back({memory.start, memory.bytes});
  return ranges;
}

const Memory *Engine::find_memory(std::uint64_t start, std::uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(memory_mutex_);
  for (const auto &[handle, memory] : memories_) {
    if (memory.start <= start && start - memory.start <= memory.bytes && bytes <= memory.start + memory.bytes - start) {
      return &memory;
    }
  }
  return nullptr;
}

ChannelPtr Engine::channel(const std::string &remote) {
  const std::lock_guard<std::mutex> lock(channels_mutex_);
  const auto found = channels_.find(remote);
  if (found == channels_.end()) refuse(26, hixl::kNotConnected, "no client channel to " + remote);
  return found->second;
}

bool Engine::connected(const std::string &remote) {
  const std::lock_guard<std::mutex> lock(channels_mutex_);
  return channels_.count(remote) != 0;
}

std::size_t Engine::channels() {
  const std::lock_guard<std::mutex> lock(channels_mutex_);
  return channels_.size();
}

void Engine::connect(const std::string &remote, std::int32_t timeout_ms) {
  check_timeout(timeout_ms);
  const auto address = parse_engine(remote);
  if (!address || address->port == 0) refuse(26, hixl::kParamInvalid, "remote engine \"" + remote + "\" is no ip:port");
  if (remote == name_) refuse(26, hixl::kParamInvalid, "an engine can't connect to itself");
  {
    const std::lock_guard<std::mutex> lock(channels_mutex_);
    if (channels_.count(remote) != 0 || connecting_.count(remote) != 0) {
      refuse(26, hixl::kAlreadyConnected, "connected to " + remote + " already");
    }
    if (channels_.size() >= options_.max_channels) refuse(26, hixl::kResourceExhausted, "all channels are in use");
    connecting_[remote] = true;
  }
  auto channel = std::make_shared<Channel>();
  channel->peer = remote;
  try {
    open_channel(channel, *address, timeout_ms);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(channels_mutex_);
    connecting_.erase(remote);
    throw;
  }
  const std::lock_guard<std::mutex> lock(channels_mutex_);
  connecting_.erase(remote);
  channels_[remote] = channel;
  count_live("hixl_channel", 1);
}

void Engine::open_channel(const ChannelPtr &channel, const EngineName &address, std::int32_t timeout_ms) {
  const Deadline deadline(timeout_ms);
  channel->control = connect_tcp(address, deadline);
  if (!channel->control.open()) {
    refuse(26, deadline.passed() ? hixl::kTimeout : hixl::kFailed,
           channel->peer + " can't be reached; there is no retry");
  }
  ConnectRequest request;
  std::copy_n(name_.c_str(), std::min(name_.size(), sizeof request.client - 1), request.client);
  request.fragment = fragment_;
  request.timeout_ms = timeout_ms;
  Frame answer;
  try {
    answer = channel->ask(Frame::of(Message::connect, request), deadline);
  } catch (const Refused &refused) {
    check_hccl(refused.code, "the connect request to " + channel->peer);
  }
  ConnectReply reply;
  if (answer.status != 0) refuse(26, answer.status, channel->peer + " refused the connection");
  if (!answer.read(&reply)) refuse(26, hixl::kFailed, channel->peer + " sent a reply that is none");
  reply.fragment.terminate();
  channel->remote_pool = reply.pool_address;
  channel->remote_pool_bytes = reply.pool_bytes;
  for (std::size_t at = sizeof reply; at + sizeof(Range) <= answer.payload.size(); at += sizeof(Range)) {
    Range range;
    std::memcpy(&range, answer.payload.data() + at, sizeof range);
    channel->remote_memories.push_back(range);
  }
  const auto ranks = merge(fragment_, reply.fragment);
  if (!ranks) refuse(26, hixl::kParamInvalid, channel->peer + " is on this very device");
  channel->link.open(name_ + "_" + channel->peer, *ranks, memory_handles(), timeout_ms, options_.traffic_class,
                     options_.service_level);
  channel->heard();
}

void Engine::close_channel(const ChannelPtr &channel) {
  channel->unavailable = true;
  transfers_->drop(*channel);
  const std::lock_guard<std::mutex> lock(channel->transfer_mutex);
  channel->link.close();
  channel->control.close();
  count_live("hixl_channel", -1);
}

void Engine::disconnect(const std::string &remote, std::int32_t timeout_ms) {
  check_timeout(timeout_ms);
  const ChannelPtr found = channel(remote);
  {
    const std::lock_guard<std::mutex> lock(channels_mutex_);
    if (channels_.erase(remote) == 0) refuse(26, hixl::kNotConnected, "no client channel to " + remote);
  }
  try {
    found->ask({Message::disconnect, 0, "", 0}, Deadline(timeout_ms));
  } catch (const Refused &) {
    log_event("hixl_disconnect_unanswered");  // a peer that is gone: this half is closed all the same
  }
  close_channel(found);
}

void Engine::transfer(const std::string &remote, hixl::TransferOp operation,
                      const std::vector<hixl::TransferOpDesc> &descs, std::int32_t timeout_ms) {
  check_timeout(timeout_ms);
  check_descs(descs, true);
  if (options_.auto_connect && !connected(remote)) connect(remote, timeout_ms);
  const ChannelPtr found = channel(remote);
  const bool sticky = flavour().number >= 910;
  if (sticky && found->unavailable) refuse(26, hixl::kFailed, "the link failed before; disconnect and connect again");
  if (descs.empty()) return;
  const Deadline deadline(timeout_ms);
  try {
    const std::lock_guard<std::mutex> lock(found->transfer_mutex);
    if (needs_pool(*this, *found, descs)) {
      bounce(*this, *found, operation != hixl::READ, descs, deadline);
    } else {
      transfers_->run(*found, operation != hixl::READ, descs, deadline);
    }
  } catch (const Refused &refused) {
    if (link_fatal(static_cast<hixl::Status>(refused.code))) {
      found->unavailable = true;
      if (options_.auto_connect) disconnect(remote, 1000);
    }
    throw;
  }
}

std::uint64_t Engine::transfer_async(const std::string &remote, hixl::TransferOp operation,
                                     const std::vector<hixl::TransferOpDesc> &descs) {
  check_descs(descs, false);
  if (options_.auto_connect && !connected(remote)) connect(remote, 1000);
  const ChannelPtr found = channel(remote);
  if (flavour().number >= 910 && found->unavailable) {
    refuse(26, hixl::kFailed, "the link failed before; disconnect and connect again");
  }
  try {
    return transfers_->start(found, operation != hixl::READ, descs);
  } catch (const Refused &refused) {
    if (link_fatal(static_cast<hixl::Status>(refused.code))) found->unavailable = true;
    throw;
  }
}

hixl::TransferStatus Engine::transfer_status(std::uint64_t request) {
  if (request == 0) refuse(29, hixl::kFailed, "GetTransferStatus: the request is null");
  return transfers_->ask(request);
}

void Engine::send_notify(const std::string &remote, const std::string &name, const std::string &message,
                         std::int32_t timeout_ms) {
  check_timeout(timeout_ms);
  constexpr std::size_t kMax = 1024;
  if (name.size() > kMax || message.size() > kMax) refuse(26, hixl::kParamInvalid, "a notify has more than 1024 bytes");
  const ChannelPtr found = channel(remote);
  NotifyRequest request;
  request.name_bytes = static_cast<std::uint32_t>(name.size());
  request.message_bytes = static_cast<std::uint32_t>(message.size());
  std::copy(name.begin(), name.end(), request.text);
  std::copy(message.begin(), message.end(), request.text + name.size());
  Frame answer;
  try {
    answer = found->ask(Frame::of(Message::notify, request), Deadline(timeout_ms));
  } catch (const Refused &refused) {
    if (refused.code == HCCL_E_TIMEOUT) refuse(26, hixl::kTimeout, "the notify was not answered");
    // Seen in the vendor's 9.2: a status that is none of its own.
    refuse(26, flavour().number >= 910 ? 1 : hixl::kFailed, "the peer has gone");
  }
  if (answer.status != 0) refuse(26, answer.status, "the peer refused the notify");
}

std::vector<std::pair<std::string, std::string>> Engine::take_notifies() {
  if (!server_) return {};
  return server_->take_notifies();
}

void Engine::beat() {
  const ScopedContext in(context_);
  std::unique_lock<std::mutex> lock(beat_mutex_);
  while (!beat_stop_.wait_for(lock, std::chrono::milliseconds(heartbeat_ms()), [this] { return stopping_; })) {
    lock.unlock();
    beat_once();
    lock.lock();
  }
}

void Engine::beat_once() {
  std::map<std::string, ChannelPtr> channels;
  {
    const std::lock_guard<std::mutex> lock(channels_mutex_);
    channels = channels_;
  }
  for (const auto &[peer, channel] : channels) {
    try {
      channel->ask({Message::ping, 0, "", 0}, Deadline(std::min<std::int64_t>(1000, heartbeat_ms())));
    } catch (const Refused &) {
      if (Channel::now_ms() - channel->heard_ms < silence_ms()) continue;
      {
        const std::lock_guard<std::mutex> lock(channels_mutex_);
        if (channels_.erase(peer) == 0) continue;
      }
      log_event("hixl_peer_silent", "\"peer\":" + json_quote(peer));
      close_channel(channel);
    }
  }
}

}  // namespace cann_sim::hixl_sim
