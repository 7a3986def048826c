// The sending half of a TCP stream: frames built on demand, one sendmsg for a header, its table and its payload.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "link.h"
#include "tcp_stream.h"

namespace kvlink::host {
namespace {

constexpr uint64_t kSendBudget = uint64_t{1} << 20;      // per call; epoll says at once when to go on
constexpr uint64_t kRequestWindow = uint64_t{16} << 20;  // unanswered bytes on one stream
constexpr size_t kAcksPerSend = 64;

}  // namespace

void TcpStream::send_some() {
  uint64_t sent_frames_bytes = 0;
  while (!dead) {
    if (out_at_ == out_.size()) {
      if (sent_frames_bytes >= kSendBudget || !build_next()) break;
      for (const iovec &piece : out_) sent_frames_bytes += piece.iov_len;
    }
    if (!flush()) {
      if (!dead) want_write(true);
      return;
    }
  }
  if (!dead) want_write(sent_frames_bytes >= kSendBudget);
}

bool TcpStream::build_next() {
  sending_data_ = false;
  const bool reply_waits = !replies_.empty();
  const bool ack_waits = reply_waits && replies_.front().header.type == static_cast<uint16_t>(FrameType::kPutAck);
  if (ack_waits) {
    build_acks();
    return true;
  }
  // Data for the peer and requests of our own take turns, so that neither side's direction starves.
  if ((request_turn_ || !reply_waits) && build_request()) {
    request_turn_ = false;
    return true;
  }
  if (dead || !reply_waits) return false;
  request_turn_ = true;
  build_data();
  return true;
}

void TcpStream::build_acks() {
  FrameHeader acks[kAcksPerSend];
  size_t count = 0;
  while (count < kAcksPerSend && !replies_.empty() &&
         replies_.front().header.type == static_cast<uint16_t>(FrameType::kPutAck)) {
    acks[count++] = replies_.front().header;
    replies_.pop_front();
  }
  set_out(acks, count * sizeof acks[0], nullptr, 0);
}

void TcpStream::build_data() {
  Reply reply = std::move(replies_.front());
  replies_.pop_front();
  std::vector<iovec> payload;
  if (reply.header.status == KVL_OK) {
    // Checked once more: the region may have been closed since the request came.
    RegionTable::Reader regions(engine_.regions());
    for (const TableEntry &entry : reply.table) {
      const Region *region = regions.find(entry.mem);
      if (region == nullptr) {
        reply.header.status = KVL_DENIED;
        reply.header.bytes = 0;
        payload.clear();
        break;
      }
      payload.push_back({region->base + entry.offset, entry.length});
    }
  }
  set_out(&reply.header, sizeof reply.header, payload.data(), payload.size());
  sending_data_ = !payload.empty();
  out_table_ = std::move(reply.table);
  engine_.stats().served_bytes.fetch_add(reply.header.bytes, std::memory_order_relaxed);
}

bool TcpStream::build_request() {
  while (requests_.size() < kMaxOutstanding && request_bytes_ < kRequestWindow) {
    Job *job = link_.next_tcp_job();
    if (job == nullptr) return false;
    struct {
      FrameHeader header;
      TableEntry table[kMaxFrameRanges];
    } head;
    iovec local[kMaxFrameRanges];
    uint32_t count = 0, bytes = 0;
    const Cursor start = job->tcp_at;
    if (!job->next_frame(engine_.regions(), link_.remotes(), head.table, local, &count, &bytes)) {
      link_.settle(job);
      continue;
    }
    head.header = {FrameHeader::kMagic,
                   static_cast<uint16_t>(job->put ? FrameType::kPut : FrameType::kGet),
                   static_cast<uint16_t>(count),
                   bytes,
                   0,
                   next_id_++};
    set_out(&head, sizeof head.header + count * sizeof head.table[0], local, job->put ? count : 0);
    requests_.push_back({job, head.header.id, bytes, job->put, start});
    request_bytes_ += bytes;
    ++job->outstanding;
    engine_.stats().frames_sent.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  return false;
}

void TcpStream::set_out(const void *head, size_t head_length, const iovec *payload, size_t count) {
  head_.resize(head_length);
  std::memcpy(head_.data(), head, head_length);
  out_.clear();
  out_.push_back({head_.data(), head_length});
  out_.insert(out_.end(), payload, payload + count);
  out_at_ = 0;
}

// True when all of out_ is sent; false when the socket is full or the link went down.
bool TcpStream::flush() {
  while (out_at_ < out_.size()) {
    msghdr message{};
    message.msg_iov = out_.data() + out_at_;
    message.msg_iovlen = std::min<size_t>(out_.size() - out_at_, IOV_MAX);
    const ssize_t sent = sendmsg(fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    engine_.stats().sendmsg_calls.fetch_add(1, std::memory_order_relaxed);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) return false;
      link_.bring_down(errno_failure(KVL_LINK_DOWN, errno, "sendmsg", "data stream %u to the peer broke", index_));
      return false;
    }
    size_t rest = static_cast<size_t>(sent);
    while (out_at_ < out_.size() && rest >= out_[out_at_].iov_len) rest -= out_[out_at_++].iov_len;
    if (rest > 0) {
      out_[out_at_].iov_base = static_cast<char *>(out_[out_at_].iov_base) + rest;
      out_[out_at_].iov_len -= rest;
    }
  }
  sending_data_ = false;
  return true;
}

void TcpStream::want_write(bool wanted) {
  if (wanted == want_write_) return;
  want_write_ = wanted;
  watch_again();
}

void TcpStream::lend(bool lent) {
  if (lent == lent_) return;
  lent_ = lent;
  watch_again();
}

void TcpStream::watch_again() { engine_.rewatch(this, (lent_ ? 0u : EPOLLIN) | (want_write_ ? EPOLLOUT : 0u)); }

}  // namespace kvlink::host
