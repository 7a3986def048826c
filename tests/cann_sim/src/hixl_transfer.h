// Transfers of an engine: batches on pooled streams, synchronous or polled (rules 26 to 29).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "hixl_abi.h"
#include "hixl_channel.h"
#include "stream.h"

namespace cann_sim::hixl_sim {

class Transfers {
 public:
  explicit Transfers(int max_streams) : max_streams_(max_streams) {}
  ~Transfers();
  Transfers(const Transfers &) = delete;
  Transfers &operator=(const Transfers &) = delete;

  // All in the engine's context; throw Refused.
  void run(Channel &channel, bool put, const std::vector<hixl::TransferOpDesc> &descs, const Deadline &deadline);
  std::uint64_t start(const std::shared_ptr<Channel> &channel, bool put,
                      const std::vector<hixl::TransferOpDesc> &descs);
  hixl::TransferStatus ask(std::uint64_t request);
  // Ends what the channel still has in flight, by force.
  void drop(Channel &channel);

 private:
  struct Request {
    std::shared_ptr<Channel> channel;
    StreamPtr stream;
  };
  StreamPtr take_stream();
  void give_stream(const StreamPtr &stream);
  void destroy(const StreamPtr &stream);

  const int max_streams_;
  std::mutex mutex_;
  std::vector<StreamPtr> idle_;
  int streams_ = 0;
  std::uint64_t next_ = 1;
  std::map<std::uint64_t, Request> requests_;
};

}  // namespace cann_sim::hixl_sim
