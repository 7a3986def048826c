// Extra copy threads for large shm and cma transfers: started at the first one, asleep whenever there is none.
#ifndef KVLINK_HOST_WORKERS_H
#define KVLINK_HOST_WORKERS_H

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kvlink::host {

class Engine;
struct Job;

class Workers {
 public:
  explicit Workers(Engine &engine) : engine_(engine) {}
  ~Workers() { stop(); }
  Workers(const Workers &) = delete;
  Workers &operator=(const Workers &) = delete;

  // Lets helpers take slices of `job` beside poll; a machine that gives no thread is no error.
  void offer(Job *job);
  // Helpers take no more of it. Those in the middle of a slice hold a claim until they are done.
  void withdraw(Job *job);
  void stop();

 private:
  void run();

  Engine &engine_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Job *> jobs_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_WORKERS_H
