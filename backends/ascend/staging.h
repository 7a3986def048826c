// The host staging area: for host memory that cannot be registered with the vendor (too large, unaligned, not pinned).
//
// One pinned, registered arena an engine, `host_staging` bytes. Half of it are chunks for this side's transfers, the
// other half windows, one a link, that the peer of that link writes to and reads from through the vendor:
//
//   local side staged     the bytes are copied through a chunk; the vendor moves chunk <-> peer
//   remote side staged    the vendor moves <-> the window; over a TCP connection beside the link, which proves the
//                         session key, the exporter is told to copy window -> region (COMMIT) or region -> window
//                         (FETCH), and answers. It serves from its engine's poll: no thread, no CPU when idle.
//   both                  both
//
// The window is managed by the peer that uses it, so one round trip a chunk is enough. A provider hooks in with four
// calls: its link blob carries a StagingBlob, link_connect calls connect, submit hands ranges over when the plan says
// `staged`, poll calls progress. The batches come back to the provider's own data path through BatchIssuer.
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
  // I/O lock held, engine's thread. At most max_batch() descriptors. A failure ends the staged transfer.
  virtual Failure issue(uint32_t operation, const Descriptor *descriptors, uint64_t count, uint64_t token) = 0;
  virtual uint64_t max_batch() const = 0;
};

class StagingArea;

// One link's staging. All calls with the I/O lock held unless said otherwise.
class StagingLink {
 public:
  ~StagingLink();

  // What the peer needs; the same every time.
  void describe(StagingBlob *blob) const;
  // Without the I/O lock; blocks up to the deadline for the side connection, if the two sides need one. Both sides call
  // it, before or after the vendor's connect.
  Failure connect(const StagingBlob &peer, const Deadline &deadline);

  // From submit (no lock): can these ranges go? UNSUPPORTED, AGAIN or OK; then enqueue takes them. The ranges stay
  // valid until the completion.
  Failure admit(const RangePlan &plan) const;
  void enqueue(uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t tag, uint64_t bytes);

  // Moves on with bounded work until `until_ns`; true when work is left that needs no event.
  bool progress(uint64_t until_ns);
  // The provider: a batch that it issued ended.
  void batch_done(uint64_t token, const Failure &failure);
  // Transfers not complete; batches issued and not ended.
  uint32_t transfers() const;
  uint32_t batches() const;

  // Ends every transfer with `reason`; nothing is issued any more. Batches out may still end.
  void stop(const Failure &reason);
  // The vendor's link is dead, so that nothing can reach the window or the chunks any more: they may be used again.
  void release();

  // OK, or why the side connection is gone (the link is then down).
  Failure check() const;

 private:
  friend class StagingArea;
  struct State;
  explicit StagingLink(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

class StagingArea {
 public:
  // `options.host_staging` 0: an area that stages nothing itself but lets links reach peers that do.
  static Failure open(std::shared_ptr<const Device> device, const CommonOptions &options, Memory &memory,
                      EventLoop &loop, CompletionQueue &completions, uint32_t path, std::unique_ptr<StagingArea> *area);
  ~StagingArea();

  bool enabled() const;
  // `issuer` outlives the link's staging.
  Failure open_link(const kvl_link_params &params, RemoteTable &remotes, BatchIssuer &issuer,
                    std::unique_ptr<StagingLink> *link);
  void statistics(uint64_t *staged_bytes, uint64_t *served_bytes, uint64_t *refused) const;

 private:
  friend class StagingLink;
  struct State;
  StagingArea();
  std::unique_ptr<State> state_;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_STAGING_H
