// The inside of streams and events, shared by stream.cc and event.cc. One mutex guards all of it; operations run
// without.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "stream.h"

namespace cann_sim {

class Event {
 public:
  void *handle = nullptr;
  bool reusable = false;  // aclrtCreateEventExWithFlag: may be recorded again; complete while not recorded
  ContextPtr context;
  uint64_t recorded = 0;   // how many records were enqueued
  uint64_t completed = 0;  // the newest of them that its stream reached
  int error = 0;
  std::condition_variable done;
  std::atomic<bool> busy{false};  // a record or query is in progress
};

struct Item {
  enum Kind { kOperation, kRecord, kWait } kind = kOperation;
  Operation operation;
  EventPtr event;
  uint64_t generation = 0;  // of the event
};

class Stream {
 public:
  void *handle = nullptr;
  ContextPtr context;
  bool stop_on_failure = false;
  bool closing = false;
  bool running = false;   // an item is in progress
  int error = 0;          // first failure; stays
  uint64_t enqueued = 0;  // items ever
  uint64_t finished = 0;  //
  uint64_t aborts = 0;
  uint64_t random = 0;
  std::deque<Item> queue;
  std::condition_variable wake;                 // its worker
  std::condition_variable idle;                 // whoever synchronises
  std::condition_variable *waits_on = nullptr;  // the event's, while the worker waits for one
  std::thread worker;
};

struct Streams {
  std::mutex mutex;
  std::map<void *, StreamPtr> streams;
  std::map<void *, EventPtr> events;
  std::map<Context *, StreamPtr> defaults;
  std::map<int, int> per_device;
  uint64_t created = 0;
  int64_t begun = 0;  // operations that any stream ever began
};
Streams &all_streams();

int64_t operations_begun();

// With the mutex held.
int push(const StreamPtr &stream, Item item);
void complete_record(const Item &item, int error);

}  // namespace cann_sim
