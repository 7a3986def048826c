#include "hixl_async.h"

#include <utility>

namespace cann_sim::hixl_sim {

using hixl::AsyncConnectStatus;

bool AsyncConnects::start(const std::string &peer, AsyncConnectStatus pending, AsyncConnectStatus done,
                          AsyncConnectStatus failed, std::function<bool()> work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry &entry = entries_[peer];
  if (entry.running) return false;
  if (entry.thread.joinable()) entry.thread.join();
  entry.status = pending;
  entry.running = true;
  entry.thread = std::thread([this, &entry, done, failed, work = std::move(work)] {
    const bool good = work();
    const std::lock_guard<std::mutex> inside(mutex_);
    entry.status = good ? done : failed;
    entry.running = false;
  });
  return true;
}

AsyncConnectStatus AsyncConnects::status(const std::string &peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(peer);
  return found == entries_.end() ? AsyncConnectStatus::NOT_CONNECT : found->second.status;
}

std::map<std::string, AsyncConnectStatus> AsyncConnects::all() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, AsyncConnectStatus> out;
  for (const auto &[peer, entry] : entries_) out[peer] = entry.status;
  return out;
}

void AsyncConnects::join() {
  std::map<std::string, Entry> ending;
  for (auto &[peer, entry] : entries_) {
    if (entry.thread.joinable()) entry.thread.join();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.swap(ending);
}

}  // namespace cann_sim::hixl_sim
