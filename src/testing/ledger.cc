#include "ledger.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "settings.h"

namespace kvlink_hook {
namespace {

uint64_t Checksum(const kvl_range *ranges, uint64_t count) {
  uint64_t hash = 1469598103934665603u;
  for (uint64_t index = 0; index < count; ++index) {
    const kvl_range &range = ranges[index];
    for (const uint64_t word :
         {uint64_t{range.mem} << 32 | range.rmem, range.local_offset, range.remote_offset, range.length}) {
      hash = (hash ^ word) * 1099511628211u;
    }
  }
  return hash;
}

std::string Hex(uint32_t handle) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[(handle >> shift) & 15u];
  return text;
}

int OpenFile(const std::string &path) { return open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600); }

}  // namespace

Ledger::~Ledger() { CloseFile(); }

bool Ledger::Open(const std::string &path, std::string *problem) {
  fd_ = OpenFile(path);
  if (fd_ < 0) {
    *problem = "hook_log: cannot open " + path + ": " + std::strerror(errno);
    return false;
  }
  path_ = path;
  return true;
}

void Ledger::CloseFile() {
  std::lock_guard<std::mutex> lock(file_mutex_);
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void Ledger::Write(const std::string &line) {
  // O_APPEND and one write a line: lines of several processes do not mix.
  const std::string text = line + "\n";
  std::lock_guard<std::mutex> lock(file_mutex_);
  const int fd = fd_ >= 0 ? fd_ : OpenFile(path_);
  if (fd < 0) return;
  const ssize_t written = write(fd, text.data(), text.size());
  static_cast<void>(written);
  if (fd != fd_) close(fd);
}

void Ledger::Call(const char *function, const void *object, kvl_status status) {
  if (!on()) return;
  const auto now =
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count();
  Write("CALL " + std::to_string(now) + " " + std::to_string(syscall(SYS_gettid)) + " " + function + " " +
        std::to_string(reinterpret_cast<uintptr_t>(object)) + " " + StatusName(status));
}

void Ledger::Violation(const char *who, const std::string &text) {
  if (on()) Write(std::string("VIOLATION ") + who + " " + text);
}

void Ledger::Say(const char *who, const std::string &text) { Write(std::string("VIOLATION ") + who + " " + text); }

void Ledger::Enter(std::atomic<int> *inside, const char *function) {
  if (inside->fetch_add(1) != 0) Violation("core", std::string(function) + " was called by two threads at once");
}

void Ledger::Limits(const kvl_attr &attr) {
  std::lock_guard<std::mutex> lock(mutex_);
  limits_ = attr;
}

void Ledger::EngineUse(const char *function) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) Say("core", std::string(function) + " on an engine that is closed");
}

void Ledger::EngineClosing() {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) Say("core", "engine_close twice");
  closed_ = true;
  for (const auto &mem : mems_) {
    if (kept_.count(mem.first) == 0) Say("core", "engine_close with memory " + Hex(mem.first) + " open");
  }
  for (const auto &link : links_) {
    if (!link.second.closed) Say("core", "engine_close with a link open");
  }
  for (const auto &submit : submits_) {
    Say("core|provider",
        "tag " + std::to_string(submit.first) + " was accepted and its completion never taken from poll");
  }
}

void Ledger::MemOpened(uint32_t mem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!mems_.emplace(mem, 0).second) Say("core", "mem_open of handle " + Hex(mem) + " which is open");
}

void Ledger::MemUse(const char *function, uint32_t mem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (mems_.count(mem) == 0) Say("core", std::string(function) + " of handle " + Hex(mem) + " which is not open");
}

void Ledger::MemClosing(uint32_t mem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = mems_.find(mem);
  if (found == mems_.end()) {
    Say("core", "mem_close of handle " + Hex(mem) + " which is not open");
  } else if (found->second != 0) {
    Say("core", "mem_close of handle " + Hex(mem) + " under " + std::to_string(found->second) + " submits");
  }
}

void Ledger::MemClosed(uint32_t mem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  mems_.erase(mem);
  kept_.erase(mem);
}

void Ledger::MemKept(uint32_t mem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  kept_.insert(mem);
}

void Ledger::LinkOpened(const void *link, uint32_t role, bool both) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  Link fresh;
  fresh.role = role;
  fresh.both = both;
  links_[link] = fresh;
}

void Ledger::LinkUse(const char *function, const void *link) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = links_.find(link);
  if (closed_) Say("core", std::string(function) + " on a link of an engine that is closed");
  if (found == links_.end() || found->second.closed) Say("core", std::string(function) + " on a link that is closed");
}

void Ledger::Connecting(const void *link) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const Link &entry = links_[link];
  if (entry.role == KVL_ROLE_ACCEPTOR && !entry.both) Say("core", "link_connect by the acceptor in INITIATOR mode");
  if (entry.connected) Say("core", "link_connect on a link that is connected");
  if (++connects_ > limits_.max_connects && limits_.max_connects != 0) {
    Say("core",
        std::to_string(connects_) + " link_connect at once; max_connects is " + std::to_string(limits_.max_connects));
  }
}

void Ledger::Connected(const void *link, kvl_status status) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  --connects_;
  links_[link].connected = status == KVL_OK;
}

void Ledger::LinkClosing(const void *link) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  Link &entry = links_[link];
  // Remote memory under a submit that only link_close can end is closed with the link.
  for (const auto &rmem : entry.rmems) {
    if (rmem.second == 0) Say("core", "link_close with idle remote memory " + Hex(rmem.first) + " open");
  }
  entry.closed = true;
}

void Ledger::LinkClosed(const void *link) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &submit : submits_) {
    if (submit.second.link != link) continue;
    CountUses(submit.second, -1);
    submit.second.mems.clear();
    submit.second.rmems.clear();
  }
}

void Ledger::RmemOpened(const void *link, uint32_t rmem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!links_[link].rmems.emplace(rmem, 0).second) Say("core", "rmem_open of handle " + Hex(rmem) + " which is open");
}

void Ledger::RmemClosing(const void *link, uint32_t rmem) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  auto &rmems = links_[link].rmems;
  const auto found = rmems.find(rmem);
  if (found == rmems.end()) {
    Say("core", "rmem_close of handle " + Hex(rmem) + " which is not open");
    return;
  }
  if (found->second != 0) Say("core", "rmem_close of handle " + Hex(rmem) + " under a submit");
  rmems.erase(found);
}

void Ledger::CountUses(const Submit &submit, int by) {
  for (const uint32_t mem : submit.mems) {
    const auto found = mems_.find(mem);
    if (found != mems_.end()) {
      found->second += by;
    } else if (by > 0) {
      Say("core", "submit names memory " + Hex(mem) + " which is not open");
    }
  }
  Link &link = links_[submit.link];
  for (const uint32_t rmem : submit.rmems) {
    const auto found = link.rmems.find(rmem);
    if (found != link.rmems.end()) {
      found->second += by;
    } else if (by > 0) {
      Say("core", "submit names remote memory " + Hex(rmem) + " which is not open on its link");
    }
  }
}

void Ledger::Submitting(const void *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  Link &entry = links_[link];
  if (entry.submitting++ != 0) Say("core", "two threads submit on one link at once");
  if (operation != KVL_PUT && operation != KVL_GET) Say("core", "submit with operation " + std::to_string(operation));
  if (count == 0) Say("core", "submit of no ranges");
  if (entry.role == KVL_ROLE_INITIATOR && !entry.connected) Say("core", "submit before link_connect succeeded");
  if (limits_.max_ranges != 0 && count > limits_.max_ranges) {
    Say("core", "submit of " + std::to_string(count) + " ranges; max_ranges is " + std::to_string(limits_.max_ranges));
  }
  Submit submit;
  submit.link = link;
  submit.ranges = ranges;
  submit.count = count;
  submit.checksum = Checksum(ranges, count);
  for (uint64_t index = 0; index < count; ++index) {
    const kvl_range &range = ranges[index];
    submit.bytes += range.length;
    submit.mems.insert(range.mem);
    submit.rmems.insert(range.rmem);
    if (range.length == 0) Say("core", "submit with an empty range");
    if (limits_.max_range_bytes != 0 && range.length > limits_.max_range_bytes) {
      Say("core", "a range of " + std::to_string(range.length) + " bytes; max_range_bytes is " +
                      std::to_string(limits_.max_range_bytes));
    }
    if (limits_.alignment > 1 && ((range.local_offset | range.remote_offset | range.length) % limits_.alignment) != 0) {
      Say("core", "a range that is not a multiple of the alignment " + std::to_string(limits_.alignment));
    }
  }
  if (!submits_.emplace(tag, submit).second)
    Say("core", "submit with tag " + std::to_string(tag) + " which is in flight");
  else
    CountUses(submit, 1);
}

void Ledger::Submitted(const void *link, uint64_t tag, kvl_status status) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  --links_[link].submitting;
  if (status != KVL_OK && status != KVL_DONE) Finish(tag, false);
}

void Ledger::Finish(uint64_t tag, bool check_ranges) {
  const auto found = submits_.find(tag);
  if (found == submits_.end()) return;
  if (check_ranges && Checksum(found->second.ranges, found->second.count) != found->second.checksum) {
    Say("core", "the ranges of tag " + std::to_string(tag) + " changed before its completion");
  }
  CountUses(found->second, -1);
  submits_.erase(found);
}

void Ledger::Completed(const kvl_completion &completion) {
  if (!on()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = submits_.find(completion.tag);
  const std::string tag = std::to_string(completion.tag);
  if (found == submits_.end()) {
    Say("provider", "a completion of tag " + tag + " which is not in flight");
    return;
  }
  if (completion.status == KVL_AGAIN || completion.status == KVL_DONE) {
    Say("provider", "tag " + tag + " completed with " + StatusName(completion.status));
  }
  if (completion.status == KVL_OK && completion.bytes != found->second.bytes) {
    Say("provider", "tag " + tag + " completed OK with " + std::to_string(completion.bytes) + " of " +
                        std::to_string(found->second.bytes) + " bytes");
  }
  if (completion.status != KVL_OK && completion.message[0] == '\0') {
    Say("provider", "tag " + tag + " failed with " + StatusName(completion.status) + " and no message");
  }
  Finish(completion.tag, true);
}

}  // namespace kvlink_hook
