// What is behind a hixl::Hixl: an engine with its own context, registered memory, and channels in both directions.
#pragma once

#include <condition_variable>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "context.h"
#include "hixl_abi.h"
#include "hixl_channel.h"
#include "hixl_options.h"
#include "hixl_server.h"
#include "hixl_transfer.h"

namespace cann_sim::hixl_sim {

using ChannelPtr = std::shared_ptr<Channel>;

struct Memory {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
  hixl::MemType type = hixl::MEM_DEVICE;
};

class Engine {
 public:
  ~Engine() { finalize(); }

  void initialize(const std::string &name, const std::map<ge::AscendString, ge::AscendString> &options);
  void finalize();

  void *register_memory(std::uint64_t start, std::uint64_t bytes, hixl::MemType type);
  void deregister_memory(void *handle);

  void connect(const std::string &remote, std::int32_t timeout_ms);
  void disconnect(const std::string &remote, std::int32_t timeout_ms);
  ChannelPtr channel(const std::string &remote);  // throws Refused(103902)
  bool connected(const std::string &remote);
  std::size_t channels();

  void transfer(const std::string &remote, hixl::TransferOp operation, const std::vector<hixl::TransferOpDesc> &descs,
                std::int32_t timeout_ms);
  std::uint64_t transfer_async(const std::string &remote, hixl::TransferOp operation,
                               const std::vector<hixl::TransferOpDesc> &descs);
  hixl::TransferStatus transfer_status(std::uint64_t request);

  void send_notify(const std::string &remote, const std::string &name, const std::string &message,
                   std::int32_t timeout_ms);
  std::vector<std::pair<std::string, std::string>> take_notifies();

  void need_initialized() const;  // throws Refused(503900); a violation after Finalize in 8.5
  bool initialized() const { return initialized_; }
  bool auto_connect() const { return options_.auto_connect; }
  const Options &options() const { return options_; }
  const std::string &name() const { return name_; }
  const ContextPtr &context() const { return context_; }
  const Fragment &fragment() const { return fragment_; }
  std::vector<void *> memory_handles();
  // What is registered here and holds the whole range, or null.
  const Memory *find_memory(std::uint64_t start, std::uint64_t bytes);
  std::mutex &pool_mutex() { return pool_mutex_; }
  Transfers &transfers() { return *transfers_; }
  // The bounce buffers: of this engine as a client, and one slice for each client of its server half. 0: none.
  std::uint64_t client_pool() const { return reinterpret_cast<std::uint64_t>(pool_); }
  std::uint64_t server_pool() const { return pool_ == nullptr ? 0 : client_pool() + options_.pool_bytes(); }
  std::vector<Range> memory_ranges();
  // Long times of the vendor, scaled.
  static std::int64_t heartbeat_ms();
  static std::int64_t silence_ms();

 private:
  void allocate_pool();
  void release_pool();
  void close_channel(const ChannelPtr &channel);
  void open_channel(const ChannelPtr &channel, const EngineName &address, std::int32_t timeout_ms);
  void beat();
  void beat_once();

  bool initialized_ = false;
  bool finalized_ = false;
  std::string name_;
  EngineName address_;
  Options options_;
  ContextPtr context_;
  Fragment fragment_;
  void *pool_ = nullptr;
  void *pool_handle_ = nullptr;

  std::mutex memory_mutex_;
  std::map<void *, Memory> memories_;

  std::mutex pool_mutex_;  // one transfer at a time bounces

  std::mutex channels_mutex_;
  std::map<std::string, ChannelPtr> channels_;  // client halves
  std::map<std::string, bool> connecting_;

  std::unique_ptr<Server> server_;
  std::unique_ptr<Transfers> transfers_;

  std::mutex beat_mutex_;
  std::condition_variable beat_stop_;
  bool stopping_ = false;
  std::thread beat_thread_;
};

// Engines of this process that are initialised; aclFinalize while there is one is a violation.
int live_engines();

}  // namespace cann_sim::hixl_sim
