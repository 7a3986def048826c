// HIXL's control connection: TCP on the host's network between an engine's listener and its clients.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "hccl_socket.h"
#include "hixl_name.h"

namespace cann_sim::hixl_sim {

using hccl::Deadline;
using hccl::Socket;

enum class Message : std::uint32_t {
  connect = 1,
  disconnect,
  ping,
  notify,
  copy_in,   // server: from its pool buffer to an address
  copy_out,  // server: from an address to its pool buffer
  reply
};

struct ConnectRequest {
  char client[128] = {};
  Fragment fragment;
  std::int32_t timeout_ms = 0;
};
// Followed by a Range for each memory registered there.
struct ConnectReply {
  Fragment fragment;
  std::uint64_t pool_address = 0;  // of the server's buffer pool; 0: none
  std::uint64_t pool_bytes = 0;
};
struct Range {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
};
struct NotifyRequest {
  std::uint32_t name_bytes = 0;
  std::uint32_t message_bytes = 0;
  char text[2048] = {};  // name, then message
};
struct CopyRequest {
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
};

struct Frame {
  Message type = Message::reply;
  std::uint32_t status = 0;  // replies
  std::string payload;
  std::uint32_t sequence = 0;  // a reply carries its request's

  template <typename Body>
  bool read(Body *body) const {
    if (payload.size() < sizeof(Body)) return false;
    std::memcpy(static_cast<void *>(body), payload.data(), sizeof(Body));
    return true;
  }
  template <typename Body>
  static Frame of(Message type, const Body &body, std::uint32_t status = 0) {
    return {type, status, std::string(reinterpret_cast<const char *>(&body), sizeof body), 0};
  }
};

// Throw Refused as Socket does: 9 at the deadline, 13 when the peer closed or sent nonsense.
void send_frame(const Socket &socket, const Frame &frame, const Deadline &deadline);
Frame receive_frame(const Socket &socket, const Deadline &deadline);

// Listening and calling sockets; not open() on failure.
Socket listen_tcp(const EngineName &name);
Socket connect_tcp(const EngineName &name, const Deadline &deadline);

}  // namespace cann_sim::hixl_sim
