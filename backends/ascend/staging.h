// The host staging area: for host memory that cannot be registered with the vendor (too large, unaligned, not pinned).
//
// One registered arena an engine, `host_staging` bytes: pinned host memory, or device memory where a link may be HCCS,
// over which a peer's host memory is out of reach. Half of it are chunks for this side's transfers, the
// other half windows, one a link, that the peer of that link writes to and reads from through the vendor:
//
//   local side staged     the bytes are copied through a chunk; the vendor moves chunk <-> peer
//   remote side staged    the vendor moves <-> the window; over a TCP connection beside the link, which proves the
//                         session key, the exporter is told to copy window -> region (COMMIT) or region -> window
//                         (FETCH), and answers. It serves from its engine's poll: no thread, no CPU when idle.
//   both                  both
//
// The window is managed by the peer that uses it, so one round trip a chunk is enough. A provider hooks in so: its link
// blob carries a StagingBlob, link_connect calls connect, submit hands ranges over when the plan says staged(), poll
// calls progress, link_close calls stop, ends its batches, and calls release. The batches come back to the provider's
// own data path through BatchIssuer.
#ifndef KVLINK_ASCEND_STAGING_H
#define KVLINK_ASCEND_STAGING_H

#include <cstdint>
#include <memory>
#include <string>

#include "ascend/completions.h"
#include "ascend/event_loop.h"
#include "ascend/memory.h"
#include "ascend/options.h"

namespace kvlink::ascend {

// Part of a provider's link blob: plain bytes from the peer, checked by StagingLink::connect.
struct StagingBlob {
  uint64_t window_address;  // in the sender's registered arena; 0: no window for this link
  uint64_t window_length;
  uint16_t port;     // of the sender's side listener; 0: it stages nothing
  uint16_t enabled;  // it may export staged regions
  uint32_t reserved;
  char host[256];
};
static_assert(sizeof(StagingBlob) == 280, "a wire struct has no padding");

// The provider's own way of moving registered memory; `token` names the batch when it ends.
class BatchIssuer {
 public:
  virtual ~BatchIssuer() = default;
  // I/O lock held, engine's thread, inside StagingLink::progress or batch_done. At most max_batch() descriptors. AGAIN:
  // no stream is free, it is tried again later. Another failure ends the transfer. Do not call batch_done from inside.
  virtual Failure issue(uint32_t operation, const Descriptor *descriptors, uint64_t count, uint64_t token) = 0;
  virtual uint64_t max_batch() const = 0;
};

class StagingArea;

// One link's staging.
class StagingLink {
 public:
  // Without release() before, its window and chunks stay taken for good: the vendor may still write to them.
  ~StagingLink();

  // What the peer needs; the same every time.
  void describe(StagingBlob *blob) const;
  // No lock held; blocks up to the deadline for the side connection, where the two sides need one. Both sides call it,
  // before or after the vendor's connect; the engine's thread must be polling. On failure the link may only be closed.
  Failure connect(const StagingBlob &peer, const Deadline &deadline);

  // From submit, no lock: can these ranges go? Then enqueue takes them; they stay valid until the completion.
  Failure admit(const RangePlan &plan) const;
  void enqueue(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag, uint64_t bytes);
  // From any thread: what has begun is finished, nothing new begins, the tag completes with CANCELLED.
  void cancel(uint64_t tag);
  // Not complete yet; from any thread.
  uint32_t transfers() const;
  // OK, or why the side connection is gone; from any thread.
  Failure check() const;

  // ---- with the I/O lock held
  // Moves on with bounded work until `until_ns`; true when work is left that needs no event. Called in every poll,
  // after EventLoop::dispatch, while transfers() is not 0. (Peers are served in dispatch.)
  bool progress(uint64_t until_ns);
  // A batch that was issued ended.
  void batch_done(uint64_t token, const Failure &failure);
  // Nothing is issued any more. Transfers end with `reason` as soon as no batch of theirs is out.
  void stop(const Failure &reason);
  // The vendor's link is dead, so that nothing can reach the window or the chunks any more: they may be used again.
  void release();

 private:
  friend class StagingArea;
  class Impl;
  explicit StagingLink(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class StagingArea {
 public:
  // `options.host_staging` 0: an area that stages nothing itself but lets links reach peers that do. `path` is the
  // number of the way "staged" in completions. Everything given outlives the area.
  static Failure open(std::shared_ptr<const Device> device, const CommonOptions &options, Memory &memory,
                      EventLoop &loop, CompletionQueue &completions, uint32_t path, std::unique_ptr<StagingArea> *area);
  // After every StagingLink. Gives the arena back, unless some link never released its part.
  ~StagingArea();
  StagingArea(const StagingArea &) = delete;
  StagingArea &operator=(const StagingArea &) = delete;

  bool enabled() const;
  // Takes the I/O lock. `remotes` and `issuer` outlive the link's staging.
  Failure open_link(const kvl_link_params &params, const RemoteTable &remotes, BatchIssuer &issuer,
                    std::unique_ptr<StagingLink> *link);
  // Bytes that this side's transfers moved through the area; copied for peers; requests and connections refused.
  void statistics(uint64_t *staged_bytes, uint64_t *served_bytes, uint64_t *refused) const;

  class Impl;

 private:
  explicit StagingArea(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_STAGING_H
