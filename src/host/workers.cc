#include "workers.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <memory>
#include <system_error>

#include "engine.h"
#include "link.h"

namespace kvlink::host {

void Workers::offer(Job *job) {
  if (engine_.thread_count() == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  if (threads_.empty()) {
    // Signals are the application's threads' business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (threads_.size() < engine_.thread_count()) threads_.emplace_back([this] { run(); });
    } catch (const std::system_error &) {
      // Fewer helpers, or none: poll copies alone.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  jobs_.push_back(job);
  work_.notify_all();
}

void Workers::withdraw(Job *job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
}

void Workers::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread &thread : threads_) thread.join();
  threads_.clear();
}

void Workers::run() {
  pthread_setname_np(pthread_self(), "kvlink-copy");
  const auto slice = std::make_unique<Slice>();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    Job *job = jobs_.front();
    {
      const std::lock_guard<std::mutex> pin(job->mutex);
      ++job->claims;  // keeps the job alive while this thread looks for a slice
    }
    lock.unlock();
    Link *link = job->link;
    const bool claimed = job->claim(engine_.regions(), link->remotes(), engine_.options().copy_slice, slice.get());
    if (claimed) {
      link->run_slice(*job, *slice);
      engine_.stats().helper_slices.fetch_add(1, std::memory_order_relaxed);
      job->release();
    } else {
      withdraw(job);
    }
    // After the last release the job may be gone; the engine's descriptor is not.
    if (job->release()) engine_.wake();
    lock.lock();
  }
}

}  // namespace kvlink::host
