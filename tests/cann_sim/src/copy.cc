// Moving the bytes: within this process, and to and from the memory of another one.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

#include "arena.h"
#include "call.h"
#include "memory.h"

namespace cann_sim {
namespace {

// Where the bytes of a range of this process are; 0 (and a violation) when it may not be copied with.
uint64_t resolve(const void *address, uint64_t bytes, const char *side) {
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  const Located located = locate(address);
  switch (located.place) {
    case Place::kDevice: {
      const uint64_t hidden = hidden_address(at, bytes);
      if (hidden == 0) {
        violation(6, "copy %s %p of %llu bytes leaves its allocation of %llu bytes", side, address,
                  static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(located.bytes));
      }
      return hidden;
    }
    case Place::kFreed:
      violation(6, "copy %s freed device memory %p", side, address);
      return 0;
    case Place::kMapped:
      violation(9, "copy %s %p, the device's address of registered host memory", side, address);
      return 0;
    default:
      return at;
  }
}

// pid and start time, from /proc/<pid>/stat; false when there is no such process or it is a zombie.
bool read_process(int32_t pid, uint64_t *started) {
  char path[40];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", pid);
  FILE *file = std::fopen(path, "re");
  if (file == nullptr) return false;
  char text[1024];
  const size_t length = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[length] = '\0';
  const char *at = std::strrchr(text, ')');  // the command may hold anything, brackets too
  char state = 0;
  unsigned long long ticks = 0;
  if (at == nullptr ||
      std::sscanf(at + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", &state,
                  &ticks) != 2) {
    return false;
  }
  *started = ticks;
  return state != 'Z' && state != 'X';
}

struct Dropped {
  std::mutex mutex;
  std::set<int32_t> pids;
};

Dropped &dropped() {
  static Dropped *const kDropped = new Dropped;
  return *kDropped;
}

bool peer_dropped(int32_t pid) {
  Dropped &d = dropped();
  const Fault fault = fault_at("peer");
  if (fault.kind == Fault::kDelay) std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
  std::lock_guard<std::mutex> lock(d.mutex);
  if (fault.kind == Fault::kDrop) d.pids.insert(pid);
  return d.pids.count(pid) != 0;
}

using Move = ssize_t (*)(pid_t, const iovec *, unsigned long, const iovec *, unsigned long, unsigned long);

RemoteResult move(Move how, const char *what, const Exported &range, uint64_t offset, const void *local,
                  uint64_t bytes) {
  if (offset > range.bytes || bytes > range.bytes - offset) {
    violation(20, "%s of %llu bytes at offset %llu leaves the exported range of %llu bytes", what,
              static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(offset),
              static_cast<unsigned long long>(range.bytes));
    return RemoteResult::kFault;
  }
  if (peer_dropped(range.process.pid)) return RemoteResult::kGone;
  const uint64_t here = resolve(local, bytes, what);
  if (here == 0) return RemoteResult::kFault;
  if (!settings().copy) return RemoteResult::kOk;
  uint64_t done = 0;
  while (done < bytes) {
    const iovec mine{reinterpret_cast<void *>(here + done), bytes - done};
    const iovec theirs{reinterpret_cast<void *>(range.hidden + offset + done), bytes - done};
    const ssize_t moved = how(range.process.pid, &mine, 1, &theirs, 1, 0);
    if (moved > 0) {
      done += static_cast<uint64_t>(moved);
      continue;
    }
    const int error = errno;
    if (error == ESRCH || !process_alive(range.process)) return RemoteResult::kGone;
    if (error == EPERM) {
      violation(32, "%s: the kernel forbids process_vm_readv on pid %d; run all processes as one user and allow ptrace",
                what, range.process.pid);
    } else {
      violation(21, "%s touches memory that is gone: here %p, there 0x%llx + %llu in pid %d (%s)", what, local,
                static_cast<unsigned long long>(range.address), static_cast<unsigned long long>(offset + done),
                range.process.pid, std::strerror(error));
    }
    return RemoteResult::kFault;
  }
  return RemoteResult::kOk;
}

}  // namespace

int copy_local(void *to, const void *from, uint64_t bytes) {
  const uint64_t target = resolve(to, bytes, "to");
  const uint64_t source = resolve(from, bytes, "from");
  if (target == 0 || source == 0) return kRtDriverError;
  if (settings().copy) std::memmove(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), bytes);
  return kAclOk;
}

int fill_local(void *to, int value, uint64_t bytes) {
  const uint64_t target = resolve(to, bytes, "to");
  if (target == 0) return kRtDriverError;
  std::memset(reinterpret_cast<void *>(target), value, bytes);
  return kAclOk;
}

ProcessId this_process() {
  ProcessId process;
  process.pid = ::getpid();
  read_process(process.pid, &process.started);
  return process;
}

bool process_alive(const ProcessId &process) {
  uint64_t started = 0;
  return read_process(process.pid, &started) && started == process.started;
}

bool export_range(const void *address, uint64_t bytes, Exported *exported) {
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  const Located located = locate(address);
  if (located.place == Place::kFreed || located.place == Place::kMapped) return false;
  uint64_t hidden = at;
  if (located.place == Place::kDevice) {
    hidden = hidden_address(at, bytes);
    if (hidden == 0) return false;
  }
  *exported = {this_process(), at, hidden, bytes, located.place == Place::kDevice ? 1U : 0U, 0};
  return true;
}

RemoteResult remote_write(const Exported &target, uint64_t offset, const void *local, uint64_t bytes) {
  return move(::process_vm_writev, "put", target, offset, local, bytes);
}

RemoteResult remote_read(const Exported &source, uint64_t offset, void *local, uint64_t bytes) {
  return move(::process_vm_readv, "get", source, offset, local, bytes);
}

}  // namespace cann_sim
