// A provider whose peer is this process: an imported region is an address, a put is a memcpy. It does what the test
// tells it to, and writes down every breach of provider.h's rules that it can see.
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "fake.h"

struct kvl_link {
  kvl_engine *engine = nullptr;
  std::atomic<bool> closed{false};
  std::atomic<bool> interrupted{false};
  std::atomic<int> submitting{0};
  std::map<uint32_t, std::pair<char *, uint64_t>> rmems;  // guarded by the engine's mutex
};

struct kvl_engine {
  std::mutex mutex;
  std::condition_variable wake;
  bool woken = false;
  std::atomic<int> polling{0}, waiting{0};
  std::map<uint32_t, kvl_mem_desc> mems;
  std::vector<std::unique_ptr<kvl_link>> links;  // closed ones too, so that a late call is seen and not a crash
  uint64_t open_links = 0;
  struct Job {
    kvl_link *link;
    uint64_t tag, bytes;
    const kvl_range *ranges;
    std::vector<kvl_range> copy;
    uint32_t operation;
  };
  std::vector<Job> held;
  struct Ready {
    kvl_completion done;
    std::vector<kvl_range> ranges;  // in flight until poll has returned the completion
  };
  std::vector<Ready> ready;
  std::map<uint64_t, std::unique_ptr<char[]>> allocations;
};

namespace {

FakeControl g_control;
std::mutex g_engines_mutex;
std::set<kvl_engine *> g_engines;
std::atomic<uint64_t> g_last_tag{0};

kvl_status failure(int status, kvl_error *err, const char *site) {
  if (status == KVL_OK || g_control.silent_failures) return status;
  err->status = status;
  err->vendor_code = 4242;
  std::strncpy(err->site, site, sizeof err->site - 1);
  std::strncpy(err->message, "scripted failure", sizeof err->message - 1);
  return status;
}

void hang_while(const std::atomic<bool> &flag) {
  if (!flag) return;
  std::unique_lock<std::mutex> lock(g_control.mutex);
  ++g_control.hanging;
  // Polled, because the test clears an atomic without this lock.
  while (flag) g_control.unhang.wait_for(lock, std::chrono::milliseconds(5));
  --g_control.hanging;
}

kvl_completion completion(uint64_t tag, uint64_t bytes, int status) {
  kvl_completion out{};
  out.tag = tag;
  out.status = status;
  out.path = 1;
  out.bytes = status == KVL_OK ? bytes : bytes / 2;
  if (status != KVL_OK && !g_control.silent_failures) {
    out.vendor_code = 77;
    std::strcpy(out.site, "fake_move");
    std::strcpy(out.message, "scripted completion failure");
  }
  return out;
}

// Moves the bytes. The engine has checked everything, so whatever is unknown here is its breach.
void move_locked(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count) {
  if (g_control.discard) return;
  for (uint64_t i = 0; i < count; ++i) {
    const kvl_range &range = ranges[i];
    const auto mem = link->engine->mems.find(range.mem);
    const auto rmem = link->rmems.find(range.rmem);
    if (mem == link->engine->mems.end() || rmem == link->rmems.end()) {
      g_control.violate("a submit named a region that is not open");
      continue;
    }
    if (range.length == 0 || range.local_offset + range.length > mem->second.length ||
        range.remote_offset + range.length > rmem->second.second) {
      g_control.violate("a submit's range is empty or outside its region");
      continue;
    }
    char *local = reinterpret_cast<char *>(mem->second.address) + range.local_offset;
    char *remote = rmem->second.first + range.remote_offset;
    std::memmove(operation == KVL_PUT ? remote : local, operation == KVL_PUT ? local : remote, range.length);
  }
}

void make_ready_locked(kvl_engine *engine, const kvl_completion &done, std::vector<kvl_range> ranges = {}) {
  engine->ready.push_back({done, std::move(ranges)});
  engine->wake.notify_all();
}

// Ends a held job: with OK its bytes move now, and its ranges must still be what they were at submit.
void end_job_locked(kvl_engine *engine, const kvl_engine::Job &job, int status) {
  if (std::memcmp(job.ranges, job.copy.data(), job.copy.size() * sizeof(kvl_range)) != 0) {
    g_control.violate("the ranges of an accepted submit changed before its completion");
  }
  if (status == KVL_OK) move_locked(job.link, job.operation, job.ranges, job.copy.size());
  make_ready_locked(engine, completion(job.tag, job.bytes, status), job.copy);
}

kvl_status probe(kvl_error *err) { return failure(g_control.engine_open_status, err, "probe"); }

kvl_status engine_open(const kvl_engine_params *, kvl_engine **engine, kvl_error *err) {
  if (const int status = g_control.engine_open_status) return failure(status, err, "engine_open");
  *engine = new kvl_engine;
  std::lock_guard<std::mutex> lock(g_engines_mutex);
  g_engines.insert(*engine);
  ++g_control.engine_opens;
  return KVL_OK;
}

void engine_close(kvl_engine *engine) {
  hang_while(g_control.hang_engine_close);
  {
    std::lock_guard<std::mutex> lock(g_engines_mutex);
    g_engines.erase(engine);
  }
  if (engine->open_links != 0) g_control.violate("engine_close with links open");
  if (!engine->mems.empty()) g_control.violate("engine_close with memory open");
  if (engine->waiting || engine->polling) g_control.violate("engine_close beside wait or poll");
  ++g_control.engine_closes;
  delete engine;
}

kvl_status engine_query(kvl_engine *, kvl_attr *attr, kvl_error *) {
  attr->connect_mode = g_control.connect_mode;
  attr->max_connects = g_control.max_connects;
  attr->max_links = g_control.max_links;
  attr->caps = g_control.caps;
  attr->memory_kinds = 1u << KVL_MEMORY_HOST;
  attr->alignment = g_control.alignment;
  attr->memory_alignment = g_control.memory_alignment;
  attr->max_ranges = g_control.max_ranges;
  attr->max_range_bytes = g_control.max_range_bytes;
  attr->max_describe = attr->max_export = 64;
  if (g_control.grouped) std::strcpy(attr->exclusion_group, "fakes");
  return KVL_OK;
}

kvl_status mem_alloc(kvl_engine *engine, uint32_t, uint64_t length, uint64_t *address, kvl_error *) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  auto memory = std::make_unique<char[]>(length);
  *address = reinterpret_cast<uint64_t>(memory.get());
  engine->allocations.emplace(*address, std::move(memory));
  ++g_control.mem_allocs;
  return KVL_OK;
}

void mem_free(kvl_engine *engine, uint64_t address) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (engine->allocations.erase(address) == 0) g_control.violate("mem_free of an unknown address");
  ++g_control.mem_frees;
}

kvl_status mem_open(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  if (const int status = g_control.mem_open_status) return failure(status, err, "mem_open");
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (!engine->mems.emplace(mem, *desc).second) g_control.violate("mem_open of a handle that is open");
  ++g_control.mem_opens;
  return KVL_OK;
}

bool names(const std::vector<kvl_range> &ranges, uint32_t mem, uint32_t rmem) {
  for (const kvl_range &range : ranges) {
    if ((mem != 0 && range.mem == mem) || (rmem != 0 && range.rmem == rmem)) return true;
  }
  return false;
}

// A submit is in flight until poll has returned its completion; its memory is touched only until it is ready.
bool touched_locked(const kvl_engine *engine, uint32_t mem, uint32_t rmem) {
  for (const auto &job : engine->held) {
    if (names(job.copy, mem, rmem)) return true;
  }
  return false;
}

bool in_flight_locked(const kvl_engine *engine, uint32_t rmem) {
  for (const auto &ready : engine->ready) {
    if (names(ready.ranges, 0, rmem)) return true;
  }
  return touched_locked(engine, 0, rmem);
}

kvl_status mem_close(kvl_engine *engine, uint32_t mem, kvl_error *err) {
  if (const int status = g_control.mem_close_status) return failure(status, err, "mem_close");
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (touched_locked(engine, mem, 0)) g_control.violate("mem_close with a submit in flight");
  if (engine->mems.erase(mem) == 0) g_control.violate("mem_close of a handle that is not open");
  ++g_control.mem_closes;
  return KVL_OK;
}

kvl_status give_blob(const void *blob, uint64_t size, void *buffer, uint64_t *length) {
  const uint64_t room = *length;
  *length = size;
  if (buffer == nullptr || room < size) return KVL_NO_RESOURCE;
  std::memcpy(buffer, blob, size);
  return KVL_OK;
}

kvl_status mem_export(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  const kvl_mem_desc &desc = engine->mems.at(mem);
  const uint64_t blob[2] = {desc.address, desc.length};
  return give_blob(blob, sizeof blob, buffer, length);
}

kvl_status mem_copy(kvl_engine *engine, uint32_t mem, uint64_t offset, void *host, uint64_t length, int32_t to_region,
                    kvl_error *) {
  hang_while(g_control.hang_mem_copy);
  std::lock_guard<std::mutex> lock(engine->mutex);
  char *address = reinterpret_cast<char *>(engine->mems.at(mem).address) + offset;
  std::memcpy(to_region != 0 ? address : host, to_region != 0 ? host : address, length);
  return KVL_OK;
}

kvl_status link_open(kvl_engine *engine, const kvl_link_params *, kvl_link **link, kvl_error *err) {
  if (const int status = g_control.link_open_status) return failure(status, err, "link_open");
  auto made = std::make_unique<kvl_link>();
  made->engine = engine;
  std::lock_guard<std::mutex> lock(engine->mutex);
  *link = made.get();
  engine->links.push_back(std::move(made));
  ++engine->open_links;
  ++g_control.link_opens;
  return KVL_OK;
}

void check_open(kvl_link *link, const char *call) {
  if (link->closed) g_control.violate(std::string(call) + " on a closed link");
}

kvl_status link_describe(kvl_link *link, void *buffer, uint64_t *length, kvl_error *) {
  check_open(link, "link_describe");
  return give_blob("fake", 4, buffer, length);
}

kvl_status link_connect(kvl_link *link, const void *, uint64_t, uint32_t, kvl_error *err) {
  check_open(link, "link_connect");
  if (g_control.hang_connect) {
    std::unique_lock<std::mutex> lock(g_control.mutex);
    ++g_control.hanging;
    while (g_control.hang_connect && !link->interrupted) g_control.unhang.wait_for(lock, std::chrono::milliseconds(5));
    --g_control.hanging;
  }
  check_open(link, "link_connect (still running)");
  if (link->interrupted) return failure(KVL_CANCELLED, err, "link_connect");
  return failure(g_control.connect_status, err, "link_connect");
}

void link_close(kvl_link *link, uint32_t) {
  hang_while(g_control.hang_link_close);
  kvl_engine *engine = link->engine;
  if (link->submitting != 0) g_control.violate("link_close beside submit");
  if (link->closed.exchange(true)) g_control.violate("link_close twice");
  ++g_control.link_closes;
  std::lock_guard<std::mutex> lock(engine->mutex);
  --engine->open_links;
  for (const auto &[rmem, region] : link->rmems) {
    if (!in_flight_locked(engine, rmem)) g_control.violate("link_close before rmem_close of an idle region");
  }
  link->rmems.clear();
  auto &held = engine->held;
  for (size_t i = 0; i < held.size();) {
    if (held[i].link != link) {
      ++i;
      continue;
    }
    if (!g_control.lose_on_close) end_job_locked(engine, held[i], KVL_CANCELLED);
    held.erase(held.begin() + static_cast<long>(i));
  }
}

kvl_status rmem_open(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t, kvl_error *err) {
  check_open(link, "rmem_open");
  if (const int status = g_control.rmem_open_status) return failure(status, err, "rmem_open");
  uint64_t words[2];
  if (length != sizeof words) return failure(KVL_INVALID, err, "rmem_open");
  std::memcpy(words, blob, sizeof words);
  std::lock_guard<std::mutex> lock(link->engine->mutex);
  if (!link->rmems.emplace(rmem, std::make_pair(reinterpret_cast<char *>(words[0]), words[1])).second) {
    g_control.violate("rmem_open of a handle that is open");
  }
  ++g_control.rmem_opens;
  return KVL_OK;
}

void rmem_close(kvl_link *link, uint32_t rmem) {
  check_open(link, "rmem_close");
  std::lock_guard<std::mutex> lock(link->engine->mutex);
  if (in_flight_locked(link->engine, rmem)) g_control.violate("rmem_close with a submit in flight");
  if (link->rmems.erase(rmem) == 0) g_control.violate("rmem_close of a handle that is not open");
  ++g_control.rmem_closes;
}

kvl_status submit(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t, uint64_t tag,
                  kvl_completion *done, kvl_error *err) {
  check_open(link, "submit");
  if (link->submitting++ != 0) g_control.violate("two submits on one link at once");
  struct Leave {
    kvl_link *link;
    ~Leave() { --link->submitting; }
  } leave{link};
  g_last_tag = tag;
  ++g_control.submits;
  hang_while(g_control.hang_submit);
  if (g_control.again > 0) {
    --g_control.again;
    return KVL_AGAIN;
  }
  if (const int status = g_control.submit_status) return failure(status, err, "submit");
  const uint64_t most = g_control.max_ranges;
  if (count == 0 || (most != 0 && count > most)) g_control.violate("a submit of too many ranges, or of none");
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < count; ++i) bytes += ranges[i].length;
  if (g_control.record) {
    std::lock_guard<std::mutex> lock(g_control.mutex);
    g_control.seen.emplace_back(ranges, ranges + count);
  }
  kvl_engine *engine = link->engine;
  std::lock_guard<std::mutex> lock(engine->mutex);
  switch (g_control.submit.load()) {
    case Submit::kInline:
      if (g_control.completion == KVL_OK) move_locked(link, operation, ranges, count);
      *done = completion(tag, bytes, g_control.completion);
      return KVL_DONE;
    case Submit::kLater:
      if (g_control.completion == KVL_OK) move_locked(link, operation, ranges, count);
      make_ready_locked(engine, completion(tag, bytes, g_control.completion),
                        std::vector<kvl_range>(ranges, ranges + count));
      return KVL_OK;
    case Submit::kHold:
      engine->held.push_back({link, tag, bytes, ranges, std::vector<kvl_range>(ranges, ranges + count), operation});
      return KVL_OK;
  }
  return KVL_INTERNAL;
}

kvl_status poll(kvl_engine *engine, kvl_completion *out, uint32_t *count, uint32_t *more, kvl_error *err) {
  ++g_control.polls;
  if (engine->polling++ != 0) g_control.violate("two polls at once");
  hang_while(g_control.hang_poll);
  struct Leave {
    kvl_engine *engine;
    ~Leave() { --engine->polling; }
  } leave{engine};
  if (const int status = g_control.poll_status) return failure(status, err, "poll");
  std::lock_guard<std::mutex> lock(engine->mutex);
  const uint32_t room = *count;
  uint32_t given = 0;
  while (given < room && !engine->ready.empty()) {
    out[given++] = engine->ready.front().done;
    engine->ready.erase(engine->ready.begin());
  }
  *count = given;
  *more = engine->ready.empty() ? 0 : 1;
  return KVL_OK;
}

void wait(kvl_engine *engine, uint32_t timeout_ms) {
  ++g_control.waits;
  if (engine->waiting++ != 0) g_control.violate("two waits at once");
  hang_while(g_control.hang_wait);
  std::unique_lock<std::mutex> lock(engine->mutex);
  const auto limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  engine->wake.wait_until(lock, limit,
                          [engine] { return engine->woken || (!engine->ready.empty() && !g_control.deaf_wait); });
  engine->woken = false;
  --engine->waiting;
}

void wake(kvl_engine *engine) {
  ++g_control.wakes;
  std::lock_guard<std::mutex> lock(engine->mutex);
  engine->woken = true;
  engine->wake.notify_all();
}

void cancel(kvl_link *link, uint64_t tag) {
  check_open(link, "cancel");
  ++g_control.cancels;
  if (!g_control.honour_cancel) return;
  kvl_engine *engine = link->engine;
  std::lock_guard<std::mutex> lock(engine->mutex);
  auto &held = engine->held;
  for (size_t i = 0; i < held.size(); ++i) {
    if (held[i].tag != tag) continue;
    end_job_locked(engine, held[i], KVL_CANCELLED);
    held.erase(held.begin() + static_cast<long>(i));
    return;
  }
}

void link_interrupt(kvl_link *link) {
  check_open(link, "link_interrupt");
  ++g_control.interrupts;
  link->interrupted = true;
  g_control.unhang.notify_all();
}

kvl_status link_check(kvl_link *link, kvl_error *err) {
  check_open(link, "link_check");
  return failure(g_control.check_status, err, "link_check");
}

kvl_status stats(kvl_engine *, kvl_stat *out, uint32_t *count, kvl_error *) {
  if (*count > 0) {
    std::strcpy(out[0].name, "submits");
    out[0].value = g_control.submits;
    *count = 1;
  }
  return KVL_OK;
}

uint64_t release_held(kvl_status status) {
  uint64_t released = 0;
  std::lock_guard<std::mutex> engines(g_engines_mutex);
  for (kvl_engine *engine : g_engines) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    for (const auto &job : engine->held) end_job_locked(engine, job, status);
    released += engine->held.size();
    engine->held.clear();
  }
  return released;
}

bool end_held(uint64_t tag, kvl_status status) {
  std::lock_guard<std::mutex> engines(g_engines_mutex);
  for (kvl_engine *engine : g_engines) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    for (auto job = engine->held.begin(); job != engine->held.end(); ++job) {
      if (job->tag != tag) continue;
      end_job_locked(engine, *job, status);
      engine->held.erase(job);
      return true;
    }
  }
  return false;
}

uint64_t held() {
  uint64_t count = 0;
  std::lock_guard<std::mutex> engines(g_engines_mutex);
  for (kvl_engine *engine : g_engines) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    count += engine->held.size();
  }
  return count;
}

void inject(uint64_t tag, kvl_status status) {
  std::lock_guard<std::mutex> engines(g_engines_mutex);
  for (kvl_engine *engine : g_engines) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    make_ready_locked(engine, completion(tag, 0, status));
  }
}

}  // namespace

#define FAKE_EXPORT __attribute__((visibility("default")))

extern "C" FAKE_EXPORT FakeApi fake_api() {
  return {&g_control, release_held, end_held, held, inject, [] { return g_last_tag.load(); }};
}

// Fills in every function; fake_init.cc makes the variants of it.
void fake_fill(kvl_provider *table) {
  table->probe = probe;
  table->engine_open = engine_open;
  table->engine_close = engine_close;
  table->engine_query = engine_query;
  table->mem_alloc = mem_alloc;
  table->mem_free = mem_free;
  table->mem_open = mem_open;
  table->mem_close = mem_close;
  table->mem_export = mem_export;
  table->mem_copy = mem_copy;
  table->link_open = link_open;
  table->link_describe = link_describe;
  table->link_connect = link_connect;
  table->link_close = link_close;
  table->rmem_open = rmem_open;
  table->rmem_close = rmem_close;
  table->submit = submit;
  table->poll = poll;
  table->wait = wait;
  table->wake = wake;
  table->cancel = cancel;
  table->link_interrupt = link_interrupt;
  table->link_check = link_check;
  table->stats = stats;
}
