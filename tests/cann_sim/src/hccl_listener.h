// The listening half of the simulated NIC: one socket and thread for each address and port of a process.
#pragma once

#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "hccl_connection.h"

namespace cann_sim::hccl {

class Listener {
 public:
  Listener(int device, std::string address, int port, int fd);
  ~Listener();
  Listener(const Listener &) = delete;
  Listener &operator=(const Listener &) = delete;

  // The socket of a caller whose hello is equal, or -1 after `timeout_ms`.
  int take(const Hello &hello, int timeout_ms);

  const int device;
  const std::string address;
  const int port;

 private:
  struct Caller {
    Socket socket;
    Hello hello;
    std::size_t received = 0;  // bytes of the hello so far
  };
  void run();
  void accept_one();
  // False when the caller has gone or sent nonsense.
  static bool read_hello(Caller &caller);

  Socket socket_;
  int wake_[2] = {-1, -1};
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::list<Caller> callers_;
  std::thread thread_;
};

// The process's listener on that address: one that already listens on any of the ports, else a new one on the first
// free port. Throws Refused(7) when all are taken.
std::shared_ptr<Listener> listen_on(int device, const std::string &address, const std::vector<int> &ports);
void close_listeners(int device);

}  // namespace cann_sim::hccl
