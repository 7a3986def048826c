// Streams and events for transfers: pooled, stopped by their first failure, destroyed rather than reused after one.
#ifndef KVLINK_ASCEND_STREAMS_H
#define KVLINK_ASCEND_STREAMS_H

#include <cstdint>
#include <mutex>
#include <vector>

#include "ascend/acl.h"

namespace kvlink::ascend {

// A stream with an event of its own. An event is recorded and queried by the engine's thread only.
struct Lane {
  aclrtStream stream = nullptr;
  aclrtEvent event = nullptr;
};

// Every call needs the engine's context current.
class StreamPool {
 public:
  StreamPool(const AclApi &acl, uint32_t most) : acl_(acl), most_(most) {}
  ~StreamPool();  // destroys idle lanes; all others were given back or discarded
  StreamPool(const StreamPool &) = delete;
  StreamPool &operator=(const StreamPool &) = delete;

  // An idle lane or a new one (stop on failure set). AGAIN when `most` are in use; NO_RESOURCE when ACL has no more.
  Failure acquire(Lane *lane);
  // Back to the pool: only after drained() said OK.
  void release(const Lane &lane);
  // Aborts what runs on it where ACL can, and destroys it. May block while the device is gone: use a VendorRunner.
  Failure discard(const Lane &lane);

  uint32_t in_use() const;

 private:
  const AclApi &acl_;
  const uint32_t most_;
  mutable std::mutex mutex_;
  std::vector<Lane> idle_;
  uint32_t in_use_ = 0;
};

// Marks the end of what was enqueued so far.
Failure record(const AclApi &acl, const Lane &lane);
// Not yet is no failure: *complete says it. A complete event is not yet success: see drained.
Failure query(const AclApi &acl, const Lane &lane, bool *complete);
// Success of a lane whose event is complete: a sync of the drained stream, which is where an error shows. A stream that
// takes longer than `timeout_ms` for it is broken (TIMEOUT).
Failure drained(const AclApi &acl, const Lane &lane, uint32_t timeout_ms);

// An event on the caller's stream, recorded now: what was enqueued there must be done before the transfer reads or
// writes. The stream's own context must be current: in submit that is the caller's, so call this before Device::enter.
Failure record_caller(const AclApi &acl, aclrtStream caller, aclrtEvent *event);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_STREAMS_H
