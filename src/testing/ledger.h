// The call log, and the book of what is open: finds where the core or the provider breaks the contract of provider.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvlink/provider.h"

namespace kvlink_hook {

// Writes one line a call and one a violation:
//   CALL <microseconds> <thread> <function> <object> <STATUS>
//   VIOLATION core|provider <text>
// Without a file it does nothing.
class Ledger {
 public:
  ~Ledger();
  bool Open(const std::string &path, std::string *problem);
  bool on() const { return !path_.empty(); }
  // The engine has gone: keeps no descriptor; what comes after is a violation and opens the file again.
  void CloseFile();

  void Call(const char *function, const void *object, kvl_status status);
  void Violation(const char *who, const std::string &text);

  void Limits(const kvl_attr &attr);
  void MemOpened(uint32_t mem);
  void MemUse(const char *function, uint32_t mem);  // before mem_export and mem_copy
  void MemClosing(uint32_t mem);                    // before mem_close
  void MemClosed(uint32_t mem);
  void MemKept(uint32_t mem);  // mem_close answered BUSY: the engine may be closed with it
  void LinkOpened(const void *link, uint32_t role, bool both);
  void LinkUse(const char *function, const void *link);  // before any call on a link
  void Connecting(const void *link);
  void Connected(const void *link, kvl_status status);
  void LinkClosing(const void *link);
  void LinkClosed(const void *link);  // its submits touch no local memory from here on
  void RmemOpened(const void *link, uint32_t rmem);
  void RmemClosing(const void *link, uint32_t rmem);
  void Submitting(const void *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag);
  void Submitted(const void *link, uint64_t tag, kvl_status status);
  void Completed(const kvl_completion &completion);
  void EngineUse(const char *function);
  void EngineClosing();

  // poll and wait each allow one caller at a time.
  void Enter(std::atomic<int> *inside, const char *function);
  void Leave(std::atomic<int> *inside) { inside->fetch_sub(1); }
  std::atomic<int> polling{0};
  std::atomic<int> waiting{0};

 private:
  struct Link {
    uint32_t role = 0;
    bool both = false;
    bool connected = false;
    bool closed = false;
    int submitting = 0;
    std::map<uint32_t, int> rmems;  // handle -> submits in flight on it
  };
  struct Submit {
    const void *link = nullptr;
    const kvl_range *ranges = nullptr;
    uint64_t count = 0;
    uint64_t bytes = 0;
    uint64_t checksum = 0;
    std::set<uint32_t> mems, rmems;
  };
  void Write(const std::string &line);
  void Say(const char *who, const std::string &text);  // a violation; the caller holds the mutex
  void Finish(uint64_t tag, bool check_ranges);
  void CountUses(const Submit &submit, int by);

  std::string path_;
  std::mutex file_mutex_;
  int fd_ = -1;  // guarded by file_mutex_
  std::mutex mutex_;
  bool closed_ = false;
  kvl_attr limits_{};
  uint32_t connects_ = 0;
  std::map<uint32_t, int> mems_;  // handle -> submits in flight on it
  std::set<uint32_t> kept_;       // of them, those whose last mem_close answered BUSY
  std::map<const void *, Link> links_;
  std::unordered_map<uint64_t, Submit> submits_;
};

}  // namespace kvlink_hook
