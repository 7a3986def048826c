#include "process.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace kvlink {
namespace {

std::atomic<uint64_t> g_fork_generation{1};

// pthread_atfork instead of getpid per call: a system call per submit would cost more than the check is worth.
[[maybe_unused]] const int g_atfork_registered =
    pthread_atfork(nullptr, nullptr, [] { g_fork_generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

void futex_wait(std::atomic<uint32_t> &word, uint32_t expected, uint64_t timeout_ns) noexcept {
  static_assert(sizeof(word) == sizeof(uint32_t), "a futex is 32 bits");
  timespec timeout{};
  timeout.tv_sec = static_cast<time_t>(timeout_ns / 1000000000u);
  timeout.tv_nsec = static_cast<long>(timeout_ns % 1000000000u);
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, expected, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t> &word) noexcept {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

uint64_t fork_generation() noexcept { return g_fork_generation.load(std::memory_order_relaxed); }

void cpu_pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

std::thread start_thread(const char *name, std::function<void()> body) {
  struct Mask {
    sigset_t old;
    Mask() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &old);
    }
    ~Mask() { pthread_sigmask(SIG_SETMASK, &old, nullptr); }
  } mask;
  std::thread thread(std::move(body));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace kvlink
