#include "ascend/runner.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cinttypes>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>

#include "ascend/device.h"

namespace kvlink::ascend {
namespace {

// One call, shared by its thread and its caller: whoever is last frees it.
struct Flight {
  std::string name;
  uint64_t since_ns = 0;
  VendorRunner::Call call;
  VendorRunner::Late late;
  host::UniqueFd done;  // readable when the call returned
  std::mutex mutex;
  bool returned = false;
  bool abandoned = false;
  Failure result;
};

// Python handles signals on its own threads only.
template <typename Body>
void start_detached(Body body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread thread(std::move(body));
    pthread_setname_np(thread.native_handle(), "kvlink-vendor");
    thread.detach();
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Failure run_guarded(const VendorRunner::Call &call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return Failure{KVL_NO_RESOURCE, 0, "allocate", "out of memory"};
  } catch (const std::exception &error) {
    return make_failure(KVL_INTERNAL, "vendor", "unexpected: %s", error.what());
  }
}

}  // namespace

struct VendorRunner::State {
  std::mutex mutex;
  std::map<const Flight *, std::shared_ptr<Flight>> hung;
};

VendorRunner::VendorRunner(std::shared_ptr<const Device> device)
    : device_(std::move(device)), state_(std::make_shared<State>()) {}

VendorRunner::~VendorRunner() = default;

Failure VendorRunner::run(const char *name, const Deadline &deadline, Call call, Late late) {
  auto flight = std::make_shared<Flight>();
  flight->name = name;
  flight->since_ns = host::now_ns();
  flight->call = std::move(call);
  flight->late = std::move(late);
  flight->done = host::UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!flight->done) return errno_failure(KVL_NO_RESOURCE, errno, "eventfd", "no descriptor for a vendor call");
  try {
    start_detached([flight, device = device_, state = state_] {
      Failure result;
      {
        const ContextGuard guard = device->enter();
        result = guard.ok() ? run_guarded(flight->call) : guard.failure();
      }
      bool abandoned;
      {
        const std::lock_guard<std::mutex> lock(flight->mutex);
        flight->result = result;
        flight->returned = true;
        abandoned = flight->abandoned;
      }
      if (abandoned) {
        if (flight->late) {
          const ContextGuard guard = device->enter();
          if (guard.ok()) {
            static_cast<void>(run_guarded([&] {
              flight->late(result);
              return Failure{};
            }));
          }
        }
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->hung.erase(flight.get());
      }
      flight->call = nullptr;
      flight->late = nullptr;
      const uint64_t one = 1;
      static_cast<void>(write(flight->done.get(), &one, sizeof one) < 0);
    });
  } catch (const std::system_error &error) {
    return make_failure(KVL_NO_RESOURCE, "pthread_create", "no thread for a vendor call: %s", error.what());
  }
  const Failure waited = host::wait_for(flight->done.get(), POLLIN, deadline, name);
  const std::lock_guard<std::mutex> lock(flight->mutex);
  if (flight->returned) return flight->result;
  flight->abandoned = true;
  {
    const std::lock_guard<std::mutex> hung(state_->mutex);
    state_->hung.emplace(flight.get(), flight);
  }
  if (waited.status == KVL_CANCELLED) {
    return make_failure(KVL_CANCELLED, name, "interrupted inside %s, which is given up", name);
  }
  return make_failure(
      KVL_TIMEOUT, name,
      "%s has not returned after %.1f s and is given up: the link is dead; if it happens again, restart "
      "this process and look at the newest file in ~/ascend/log",
      name, static_cast<double>(host::now_ns() - flight->since_ns) / 1e9);
}

Failure VendorRunner::run_exclusive(const char *name, const Deadline &deadline, Call call, Late late) {
  // Owned by the call: it is released when the vendor's function returns, not when its caller gives up.
  auto lock = std::make_shared<InitLock>();
  const Failure failure = InitLock::acquire(name, deadline, lock.get());
  if (!failure.ok()) return failure;
  const auto exclusive = [lock, call = std::move(call)] { return call(); };
  const auto afterwards = [lock, late = std::move(late)](const Failure &result) {
    if (late) late(result);
  };
  return run(name, deadline, exclusive, afterwards);
}

uint32_t VendorRunner::abandoned() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return static_cast<uint32_t>(state_->hung.size());
}

bool VendorRunner::degraded() const { return abandoned() > 0; }

Failure VendorRunner::health() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->hung.empty()) return {};
  const Flight &flight = *state_->hung.begin()->second;
  return make_failure(KVL_ENGINE_DOWN, flight.name.c_str(),
                      "the channel is degraded: %zu vendor call(s) hang, the first is %s since %.1f s; restart this "
                      "process",
                      state_->hung.size(), flight.name.c_str(),
                      static_cast<double>(host::now_ns() - flight.since_ns) / 1e9);
}

}  // namespace kvlink::ascend
