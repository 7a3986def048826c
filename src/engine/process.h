// What the engine needs from the process and the kernel: clock, futex, fork guard, threads that take no signals.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

namespace kvlink {

constexpr uint64_t kForever = UINT64_MAX;
constexpr uint64_t kMillisecond = 1000000;

inline uint64_t now_ns() noexcept {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

// A point on the steady clock `ms` from `now`.
inline uint64_t after_ms(uint64_t now, uint64_t ms) noexcept { return now + ms * kMillisecond; }

inline std::chrono::steady_clock::time_point time_point(uint64_t ns) noexcept {
  return std::chrono::steady_clock::time_point(
      std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::nanoseconds(ns)));
}

// Sleeps while `word` is `expected`, at most `timeout_ns`; may return early.
void futex_wait(std::atomic<uint32_t> &word, uint32_t expected, uint64_t timeout_ns) noexcept;
void futex_wake_all(std::atomic<uint32_t> &word) noexcept;

// Grows in every child of a fork. An object that remembers it knows whether it lives in the process that made it.
uint64_t fork_generation() noexcept;

// Tells the CPU that this is a spin.
void cpu_pause() noexcept;

// Starts a named thread with all signals blocked, so that Python's signal handling stays on Python's threads.
// Throws std::system_error.
std::thread start_thread(const char *name, std::function<void()> body);

}  // namespace kvlink
