// A client that speaks the host provider's wire protocol by hand, rightly or wrongly as a test wants.
#ifndef KVLINK_TESTS_HOST_WIRE_CLIENT_H
#define KVLINK_TESTS_HOST_WIRE_CLIENT_H

#include <vector>

#include "auth.h"
#include "blob.h"
#include "frames.h"
#include "harness.h"
#include "socket.h"

namespace kvlink::test {

class WireClient {
 public:
  // Connects to the listener that a link_describe blob names.
  WireClient(const Bytes &link_blob, host::StreamKind kind);

  void send(const void *data, size_t length);
  void receive(void *data, size_t length);
  // Did the other side close the connection (within five seconds)?
  bool closed();
  int fd() const { return fd_.get(); }

  host::Hello hello(uint8_t session, uint16_t index = 0, uint16_t count = 1) const;
  host::Challenge challenge(const host::Hello &hello);
  static host::Proof proof(uint8_t key, const host::Hello &hello, const host::Challenge &challenge);
  // The whole handshake, honestly.
  void authenticate(uint8_t session, uint8_t key, uint16_t index = 0, uint16_t count = 1);

  void request(host::FrameType type, const std::vector<host::TableEntry> &table, const Bytes &payload);
  host::FrameHeader answer();

 private:
  host::StreamKind kind_;
  host::UniqueFd fd_;
  uint64_t next_id_ = 1;
};

}  // namespace kvlink::test

#endif  // KVLINK_TESTS_HOST_WIRE_CLIENT_H
