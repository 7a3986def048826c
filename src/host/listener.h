// Accepts data connections and lets them in when they prove the session key of a link that waits for them.
#ifndef KVLINK_HOST_LISTENER_H
#define KVLINK_HOST_LISTENER_H

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>

#include "auth.h"
#include "engine.h"

namespace kvlink::host {

class Listener;

// A connection that has proved nothing yet. It may send a Hello and a Proof within five seconds, and not a byte more.
class PendingConnection : public Watch {
 public:
  PendingConnection(Listener &listener, UniqueFd socket, uint64_t expires_ns);
  void on_events(uint32_t events) override;
  uint64_t expires_ns() const { return expires_ns_; }

 private:
  enum class Step { kHello, kProof };

  bool receive(void *message, size_t size);
  void on_hello();
  void on_proof();
  void admit(Link *link);
  bool reply(const void *message, size_t size);
  void refuse();

  Listener &listener_;
  const uint64_t expires_ns_;
  Step step_ = Step::kHello;
  size_t received_ = 0;
  Hello hello_{};
  Proof proof_{};
  Challenge challenge_{};
};

class Listener : public Watch {
 public:
  Listener(Engine &engine, StreamKind kind, UniqueFd socket);
  void on_events(uint32_t events) override;
  // Drops connections whose time is up (I/O lock held).
  void expire();
  // Milliseconds until one is; any thread.
  uint64_t next_expiry_ms() const;
  void forget(PendingConnection *connection);

  Engine &engine() { return engine_; }
  StreamKind kind() const { return kind_; }

 private:
  void note_expiry();

  Engine &engine_;
  const StreamKind kind_;
  UniqueFd spare_;  // given up for a moment when descriptors run out, to turn callers away instead of spinning
  std::deque<std::unique_ptr<PendingConnection>> pending_;  // oldest first
  std::atomic<uint64_t> next_expiry_ns_{UINT64_MAX};
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_LISTENER_H
