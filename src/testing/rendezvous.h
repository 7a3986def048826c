// Both sides of a link meet inside link_connect, within one process or across processes of one host.
#pragma once

#include <chrono>
#include <string>

#include "kvlink/provider.h"

namespace kvlink_hook {

using Clock = std::chrono::steady_clock;

// One side of one meeting. Two named pipes keyed by the session: what a side writes stays there only while it is
// inside, so that a side which came and gave up is never met.
class Meeting {
 public:
  Meeting(const std::string &folder, const std::string &session, uint32_t role, int interrupt_fd);
  ~Meeting();
  Meeting(const Meeting &) = delete;
  Meeting &operator=(const Meeting &) = delete;

  // Waits until the other side is inside too.
  kvl_status Meet(Clock::time_point deadline, kvl_error *err);
  // Tells the other side how our part ended.
  void Tell(bool good);
  // Waits for the other side's Tell: REMOTE when it failed.
  kvl_status Await(Clock::time_point deadline, kvl_error *err);

 private:
  bool OpenPipes(kvl_error *err, kvl_status *status);
  kvl_status Read(Clock::time_point deadline, const char *what, char *byte, kvl_error *err);

  std::string read_path_, write_path_;
  int read_fd_ = -1, write_fd_ = -1;
  int interrupt_fd_;
};

// Waits for the interrupt or the time; returns true when interrupted. `interrupt_fd` may be -1.
bool SleepUntil(Clock::time_point when, int interrupt_fd);

}  // namespace kvlink_hook
