// The server half of an engine with a port: its listener, and a session for each client that connected.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hixl_channel.h"

namespace cann_sim::hixl_sim {

class Engine;

class Server {
 public:
  // Throws Refused(503900) when the address is taken.
  Server(Engine *engine, const EngineName &address);
  ~Server();
  Server(const Server &) = delete;
  Server &operator=(const Server &) = delete;

  std::vector<std::pair<std::string, std::string>> take_notifies();
  std::size_t clients();

 private:
  struct Session {
    Channel channel;
    std::deque<std::pair<std::string, std::string>> inbox;  // lost when the client disconnects first
    int pool_slice = -1;
    std::atomic<bool> stop{false};
    std::atomic<bool> done{false};
    std::thread thread;
  };
  using SessionPtr = std::shared_ptr<Session>;

  void accept_loop();
  void reap(bool all);
  void serve(const SessionPtr &session);
  void close_link(const SessionPtr &session);
  void replace_older(const SessionPtr &session, const std::string &client, const Deadline &deadline);
  int free_slice();
  Frame handle(const SessionPtr &session, const Frame &request);
  Frame connect(const SessionPtr &session, const Frame &request);
  void prepare(const SessionPtr &session, const ConnectRequest &request);
  Frame notify(const SessionPtr &session, const Frame &request);
  Frame copy(const SessionPtr &session, const Frame &request);

  Engine *engine_;
  Socket socket_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::list<SessionPtr> sessions_;
  std::thread thread_;
};

}  // namespace cann_sim::hixl_sim
