// A stream socket with deadlines, for the rendezvous of HCCL and the control connections of HIXL.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace cann_sim::hccl {

// The end of a wait; negative: none.
class Deadline {
 public:
  explicit Deadline(std::int64_t milliseconds)
      : for_ever_(milliseconds < 0),
        end_(std::chrono::steady_clock::now() + std::chrono::milliseconds(for_ever_ ? 0 : milliseconds)) {}
  bool passed() const { return !for_ever_ && std::chrono::steady_clock::now() >= end_; }
  // For poll(): what is left, at most `cap`.
  int left_ms(int cap) const;

 private:
  bool for_ever_;
  std::chrono::steady_clock::time_point end_;
};

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket &&other) noexcept : fd_(other.fd_.exchange(-1)) {}
  Socket &operator=(Socket &&other) noexcept;
  ~Socket() { close(); }

  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void close();
  int release() { return fd_.exchange(-1); }
  void shut_down() const;    // the other thread's reads end; the number stays taken
  bool peer_closed() const;  // end of file or reset has arrived

  // Whole messages; throw Refused: 9 when the deadline passes, 13 when the peer closed.
  void send_all(const void *bytes, std::size_t size, const Deadline &deadline) const;
  void receive_all(void *bytes, std::size_t size, const Deadline &deadline) const;

 private:
  std::atomic<int> fd_{-1};
};

[[noreturn]] void refuse_late();    // throws Refused(9)
[[noreturn]] void refuse_closed();  // throws Refused(13)

}  // namespace cann_sim::hccl
