#include "rendezvous.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "faults.h"

namespace kvlink_hook {
namespace {

constexpr char kHere = 'h';
constexpr char kGood = 'g';
constexpr char kBad = 'b';

int RemainingMs(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<long long>(left, 0, 3600 * 1000));
}

// Creates the pipe if the other side has not, and opens it so that neither opening nor writing ever blocks. The other
// side removes the name when it leaves, so creating and opening are tried together.
int OpenPipe(const std::string &path) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    if (mkfifo(path.c_str(), 0600) != 0 && errno != EEXIST) return -1;
    const int fd = open(path.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 || errno != ENOENT) return fd;
  }
  return -1;
}

}  // namespace

Meeting::Meeting(const std::string &folder, const std::string &session, uint32_t role, int interrupt_fd)
    : interrupt_fd_(interrupt_fd) {
  const std::string base = folder + "/kvlink-hook-" + session;
  const bool initiator = role == KVL_ROLE_INITIATOR;
  read_path_ = base + (initiator ? ".to_initiator" : ".to_acceptor");
  write_path_ = base + (initiator ? ".to_acceptor" : ".to_initiator");
}

Meeting::~Meeting() {
  // Whoever leaves first takes the names away: a side that comes later must not meet one that has gone.
  unlink(read_path_.c_str());
  unlink(write_path_.c_str());
  if (read_fd_ >= 0) close(read_fd_);
  if (write_fd_ >= 0) close(write_fd_);
}

bool Meeting::OpenPipes(kvl_error *err, kvl_status *status) {
  read_fd_ = OpenPipe(read_path_);
  const int read_errno = errno;
  write_fd_ = read_fd_ >= 0 ? OpenPipe(write_path_) : -1;
  if (read_fd_ >= 0 && write_fd_ >= 0) return true;
  const int code = read_fd_ < 0 ? read_errno : errno;
  *status = Fail(err, KVL_NO_RESOURCE, code, "mkfifo", "cannot meet at " + read_path_ + ": " + std::strerror(code));
  return false;
}

kvl_status Meeting::Read(Clock::time_point deadline, const char *what, char *byte, kvl_error *err) {
  for (;;) {
    const ssize_t got = read(read_fd_, byte, 1);
    if (got == 1) return KVL_OK;
    const int left = RemainingMs(deadline);
    if (left == 0) {
      return Fail(err, KVL_TIMEOUT, 0, "hook:rendezvous",
                  std::string("the other side did not ") + what + " before the deadline");
    }
    pollfd fds[2] = {{read_fd_, POLLIN, 0}, {interrupt_fd_, POLLIN, 0}};
    ::poll(fds, interrupt_fd_ >= 0 ? 2 : 1, left);
    if (interrupt_fd_ >= 0 && (fds[1].revents & POLLIN) != 0) {
      return Fail(err, KVL_CANCELLED, 0, "hook:rendezvous", "the connect was interrupted");
    }
  }
}

kvl_status Meeting::Meet(Clock::time_point deadline, kvl_error *err) {
  kvl_status status = KVL_OK;
  if (!OpenPipes(err, &status)) return status;
  if (write(write_fd_, &kHere, 1) != 1) {
    return Fail(err, KVL_INTERNAL, errno, "write", "cannot write to the meeting's pipe");
  }
  char byte = 0;
  return Read(deadline, "enter link_connect", &byte, err);
}

void Meeting::Tell(bool good) {
  const char byte = good ? kGood : kBad;
  // The other side may have left with an error of its own; then nobody needs this byte.
  if (write(write_fd_, &byte, 1) != 1) return;
}

kvl_status Meeting::Await(Clock::time_point deadline, kvl_error *err) {
  char byte = 0;
  const kvl_status status = Read(deadline, "finish link_connect", &byte, err);
  if (status != KVL_OK) return status;
  if (byte == kGood) return KVL_OK;
  return Fail(err, KVL_REMOTE, 0, "hook:rendezvous", "the other side's link_connect failed");
}

bool SleepUntil(Clock::time_point when, int interrupt_fd) {
  for (int left = RemainingMs(when); left > 0; left = RemainingMs(when)) {
    pollfd fd = {interrupt_fd, POLLIN, 0};
    ::poll(&fd, interrupt_fd >= 0 ? 1 : 0, left);
    if (interrupt_fd >= 0 && (fd.revents & POLLIN) != 0) return true;
  }
  return false;
}

}  // namespace kvlink_hook
