// The Unix socket of a link on one host: passes shared memory, and its end of file says that the peer is gone.
#ifndef KVLINK_HOST_LOCAL_SOCKET_H
#define KVLINK_HOST_LOCAL_SOCKET_H

#include <cstdint>

#include "engine.h"

namespace kvlink::host {

class Link;

enum class LocalMessageType : uint32_t { kVerdict = 1, kDescriptorRequest = 2, kDescriptorReply = 3 };

struct LocalMessage {
  static constexpr uint32_t kMagic = 0x4d4b5648;
  uint32_t magic;
  uint32_t type;    // enum LocalMessageType
  uint64_t id;      // of the request
  uint32_t mem;     // the exporter's handle
  int32_t status;   // reply: a kvl_status; verdict: 1 when TCP streams follow
  uint64_t length;  // reply: of the region
  uint32_t access;  // reply: of the region
  uint32_t reserved;
};
static_assert(sizeof(LocalMessage) == 40, "a wire struct has no padding");

class LocalSocket : public Watch {
 public:
  LocalSocket(Link &link, UniqueFd socket);
  void on_events(uint32_t events) override;
  Failure send(const LocalMessage &message, int passed_fd = -1);

 private:
  bool handle(const LocalMessage &message, UniqueFd passed);
  void answer(const LocalMessage &request);

  Link &link_;
};

// The peer's process ends: no copy may start towards a number that another process could get.
class ProcessWatch : public Watch {
 public:
  ProcessWatch(Link &link, int pidfd);
  void on_events(uint32_t events) override;

 private:
  Link &link_;
};

pid_t peer_process(int socket);
int open_pidfd(pid_t pid);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_LOCAL_SOCKET_H
