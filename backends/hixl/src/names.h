// Which remote engines are in use: the vendor knows one connection by the remote engine's name, so a new link to a name
// waits until the old one's Disconnect is over.
#ifndef KVLINK_HIXL_NAMES_H
#define KVLINK_HIXL_NAMES_H

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "ascend/registry.h"

namespace kvlink::hixl_provider {

class Names : public std::enable_shared_from_this<Names> {
 public:
  // Holds a name until it goes; calls that were given up may keep it past the life of their link and engine.
  class Hold {
   public:
    Hold(std::shared_ptr<Names> names, std::string name) : names_(std::move(names)), name_(std::move(name)) {}
    ~Hold() { names_->release(name_); }
    Hold(const Hold &) = delete;
    Hold &operator=(const Hold &) = delete;

   private:
    std::shared_ptr<Names> names_;
    std::string name_;
  };

  // TIMEOUT when the name is still held at the deadline, CANCELLED when that was interrupted.
  ascend::Failure take(const std::string &name, const ascend::Deadline &deadline, std::shared_ptr<Hold> *hold) {
    std::unique_lock<std::mutex> lock(mutex_);
    const kvl_status waited =
        ascend::wait_interruptibly(changed_, lock, deadline, [&] { return taken_.count(name) == 0; });
    if (waited != KVL_OK) {
      return ascend::make_failure(waited, "Hixl::Connect",
                                  "an earlier connection to %s is still being closed: try again later", name.c_str());
    }
    taken_.insert(name);
    lock.unlock();
    *hold = std::make_shared<Hold>(shared_from_this(), name);
    return {};
  }

 private:
  void release(const std::string &name) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      taken_.erase(name);
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::string> taken_;
};

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_NAMES_H
