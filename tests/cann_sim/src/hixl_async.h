// ConnectAsync and DisconnectAsync (9.1 on): one thread a request, its state kept until the next.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "hixl_abi.h"

namespace cann_sim::hixl_sim {

class AsyncConnects {
 public:
  ~AsyncConnects() { join(); }

  // Runs `work` on a thread; the state goes from `pending` to `done` or `failed`. False while one is running for the
  // peer.
  bool start(const std::string &peer, hixl::AsyncConnectStatus pending, hixl::AsyncConnectStatus done,
             hixl::AsyncConnectStatus failed, std::function<bool()> work);
  hixl::AsyncConnectStatus status(const std::string &peer);
  std::map<std::string, hixl::AsyncConnectStatus> all();
  void join();

 private:
  struct Entry {
    hixl::AsyncConnectStatus status = hixl::AsyncConnectStatus::NOT_CONNECT;
    bool running = false;
    std::thread thread;
  };
  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

}  // namespace cann_sim::hixl_sim
