// One accepted submit: what is left to do, what is under way, what went wrong first.
#ifndef KVLINK_HOST_JOB_H
#define KVLINK_HOST_JOB_H

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <mutex>

#include "copy.h"
#include "failure.h"
#include "frames.h"
#include "memory.h"
#include "options.h"
#include "remote.h"

namespace kvlink::host {

class Link;

// A place in the array of ranges.
struct Cursor {
  uint64_t range = 0;
  uint64_t offset = 0;
};

// A piece of a job that goes by shm or cma, small enough to run between two looks at the clock.
struct Slice {
  static constexpr size_t kMaxPieces = 1024;  // IOV_MAX
  Path path = Path::kShm;
  size_t count = 0;
  uint64_t bytes = 0;
  iovec local[kMaxPieces];
  iovec remote[kMaxPieces];
};

struct Job {
  Link *link = nullptr;
  uint64_t tag = 0;
  bool put = false;
  const kvl_range *ranges = nullptr;  // the core's, valid until the completion
  uint64_t count = 0;
  uint64_t bytes = 0;
  bool uses_memory = false;  // some range goes by shm or cma
  bool uses_tcp = false;
  Path slowest = Path::kShm;
  bool tuned = false;  // large enough that the copy kernel matters
  uint64_t piece = 0;  // bytes of a range on average

  // Set from any thread; work that has begun is finished, nothing new begins.
  std::atomic<bool> cancelled{false};
  std::atomic<bool> failed{false};
  std::atomic<uint64_t> moved{0};

  std::mutex mutex;  // guards the next four
  Failure failure;   // the first one
  Cursor memory_at;  // the shm and cma part
  bool memory_end = false;
  uint32_t claims = 0;  // slices being copied, and helpers that look for one

  // Guarded by the engine's I/O lock.
  Cursor tcp_at;
  bool tcp_end = false;
  uint32_t outstanding = 0;  // frames whose answer is missing
  bool queued_tcp = false;   // in the link's queue
  bool attached = false;     // poll's thread has taken it over from the submitting one; only then may it end

  bool stopped() const { return cancelled.load() || failed.load(); }
  void fail(const Failure &first);
  // Nothing left that could touch memory or change the outcome (I/O lock held).
  bool finished();

  // Takes the next slice of the shm and cma part; false when none is left. A claim is held when it returned true.
  bool claim(const RegionTable &regions, const RemoteTable &remotes, uint64_t slice_bytes, Slice *slice);
  // Gives a claim back; true when it was the last one and nothing is left to claim.
  bool release();

  // Takes the next frame of the TCP part: the table for the peer and the local memory. False when none is left. The
  // cursor moves.
  bool next_frame(const RegionTable &regions, const RemoteTable &remotes, TableEntry *table, iovec *local,
                  uint32_t *count, uint32_t *bytes);
  // The local memory of the frame that began at `start`: what next_frame gave, again.
  uint32_t frame_targets(const RegionTable &regions, const RemoteTable &remotes, Cursor start, uint32_t bytes,
                         iovec *local) const;
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_JOB_H
