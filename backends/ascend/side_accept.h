// The listener for side connections, and connections that have not proved their session key yet.
#ifndef KVLINK_ASCEND_SIDE_ACCEPT_H
#define KVLINK_ASCEND_SIDE_ACCEPT_H

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ascend/event_loop.h"
#include "host/auth.h"

namespace kvlink::ascend {

using SessionId = std::array<uint8_t, 16>;
using SessionKey = uint8_t[32];

// Which link a newcomer may prove to belong to. I/O lock held.
class SideDirectory {
 public:
  virtual ~SideDirectory() = default;
  // The session key of a link that waits for a connection; null when there is none.
  virtual const SessionKey *find_key(const SessionId &session) = 0;
  virtual void admit(const SessionId &session, UniqueFd socket) = 0;
  virtual void refused() = 0;
};

class SideListener;

// A newcomer: Hello, Challenge, Proof, Ready, with no thread and no more memory than these.
class PendingSide final : public Watch {
 public:
  PendingSide(SideListener &listener, UniqueFd socket, uint64_t expires_ns);
  void on_events(uint32_t events) override;
  uint64_t expires_ns() const { return expires_ns_; }

 private:
  bool receive(void *message, size_t size);  // true when all of it is there
  bool reply(const void *message, size_t size);
  void on_hello();
  void on_proof();
  void refuse();

  SideListener &listener_;
  const uint64_t expires_ns_;
  bool greeted_ = false;
  size_t received_ = 0;
  host::Hello hello_{};
  host::Challenge challenge_{};
  host::Proof proof_{};
};

class SideListener final : public Watch {
 public:
  SideListener(EventLoop &loop, SideDirectory &directory) : loop_(loop), directory_(directory) {}
  // Binds and listens; enters the loop.
  Failure open(const std::string &host);
  void on_events(uint32_t events) override;
  uint16_t port() const { return port_; }
  void close();  // drops the newcomers; out of the loop

 private:
  friend class PendingSide;
  void forget(PendingSide *item);
  void expire();
  void arm_timer();

  // Readable when the oldest newcomer has had its time.
  class Timer final : public Watch {
   public:
    explicit Timer(SideListener &listener) : listener_(listener) {}
    void on_events(uint32_t events) override;

   private:
    SideListener &listener_;
  };

  EventLoop &loop_;
  SideDirectory &directory_;
  uint16_t port_ = 0;
  std::vector<std::unique_ptr<PendingSide>> pending_;
  std::unique_ptr<Timer> timer_;
};

// The other end: connects and proves. Blocks up to the deadline.
Failure connect_side(const std::string &host, uint16_t port, const SessionId &session, const SessionKey &key,
                     const Deadline &deadline, UniqueFd *socket);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_SIDE_ACCEPT_H
