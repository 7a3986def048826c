#include "hixl_channel.h"

#include "hccl_refused.h"

namespace cann_sim::hixl_sim {

Frame Channel::ask(Frame request, const Deadline &deadline) {
  const std::lock_guard<std::mutex> lock(control_mutex);
  request.sequence = ++sequence;
  send_frame(control, request, deadline);
  while (true) {
    Frame reply = receive_frame(control, deadline);
    heard();
    if (reply.sequence == request.sequence) return reply;  // else: of a request that was given up
  }
}

}  // namespace cann_sim::hixl_sim
