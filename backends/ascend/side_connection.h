// A TCP connection beside a link, once its session key was proved: whole frames in, whole frames out.
#ifndef KVLINK_ASCEND_SIDE_CONNECTION_H
#define KVLINK_ASCEND_SIDE_CONNECTION_H

#include <cstdint>
#include <vector>

#include "ascend/event_loop.h"
#include "ascend/staging_wire.h"

namespace kvlink::ascend {

// Who handles what comes in. I/O lock held.
class SideHandler {
 public:
  virtual ~SideHandler() = default;
  // A request (with its table) or an answer, well-formed.
  virtual void on_frame(const SideHeader &header, const SideEntry *table) = 0;
  // Once: the connection broke, or the peer broke the protocol. The connection is dead; bury it.
  virtual void on_lost(const Failure &reason) = 0;
};

class SideConnection final : public Watch {
 public:
  SideConnection(EventLoop &loop, SideHandler &handler, UniqueFd socket);
  Failure start();  // into the loop
  void on_events(uint32_t events) override;
  void send(const SideHeader &header, const SideEntry *table);
  bool lost() const { return lost_; }

 private:
  // Takes one frame from the socket and handles it; false when it is not all there. What is left stays in the socket,
  // which then stays ready: no frame waits for anything but the loop.
  bool receive_one();
  void flush();
  void fail(const Failure &reason);

  EventLoop &loop_;
  SideHandler &handler_;
  bool lost_ = false, watching_out_ = false;
  SideHeader header_{};
  SideEntry table_[kMaxSideEntries];
  size_t received_ = 0;  // of the frame: header, then table
  std::vector<char> out_;
  size_t out_begin_ = 0;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_SIDE_CONNECTION_H
