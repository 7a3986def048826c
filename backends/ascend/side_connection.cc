#include "ascend/side_connection.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace kvlink::ascend {
namespace {

constexpr size_t kMostOut = 1u << 20;  // answers and requests that the peer does not take: it is broken or hostile
constexpr uint64_t kBudgetNs = 200 * 1000;

}  // namespace

SideConnection::SideConnection(EventLoop &loop, SideHandler &handler, UniqueFd socket)
    : loop_(loop), handler_(handler) {
  fd = std::move(socket);
}

Failure SideConnection::start() { return loop_.watch(this, EPOLLIN); }

void SideConnection::on_events(uint32_t events) {
  if (lost_) return;  // reported in the batch in which it broke
  if ((events & EPOLLOUT) != 0) flush();
  const uint64_t until_ns = now_ns() + kBudgetNs;
  while (!lost_ && receive_one() && now_ns() < until_ns) {
  }
}

bool SideConnection::receive_one() {
  for (;;) {
    const bool in_table = received_ >= sizeof header_;
    const size_t size = sizeof header_ + (in_table ? header_.count * sizeof(SideEntry) : 0);
    if (in_table && received_ == size) break;
    char *place = in_table ? reinterpret_cast<char *>(table_) + (received_ - sizeof header_)
                           : reinterpret_cast<char *>(&header_) + received_;
    const ssize_t got = recv(fd.get(), place, size - received_, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return false;
    if (got < 0) {
      fail(errno_failure(KVL_LINK_DOWN, errno, "recv", "the staging connection broke"));
      return false;
    }
    if (got == 0) {
      fail(make_failure(KVL_LINK_DOWN, "recv", "the peer closed the staging connection"));
      return false;
    }
    received_ += static_cast<size_t>(got);
    if (received_ != sizeof header_) continue;
    const bool request = header_.type == static_cast<uint16_t>(SideType::kCommit) ||
                         header_.type == static_cast<uint16_t>(SideType::kFetch);
    const bool answer = header_.type == static_cast<uint16_t>(SideType::kAnswer);
    if (header_.magic != SideHeader::kMagic || header_.count > kMaxSideEntries ||
        !(request ? header_.count > 0 : answer && header_.count == 0)) {
      fail(make_failure(KVL_REMOTE, "staging", "the peer sent a frame of type %u with %u entries", header_.type,
                        header_.count));
      return false;
    }
  }
  received_ = 0;
  handler_.on_frame(header_, table_);
  return true;
}

void SideConnection::send(const SideHeader &header, const SideEntry *table) {
  if (lost_) return;
  const size_t at = out_.size(), bytes = header.count * sizeof(SideEntry);
  out_.resize(at + sizeof header + bytes);
  std::memcpy(&out_[at], &header, sizeof header);
  if (bytes > 0) std::memcpy(&out_[at + sizeof header], table, bytes);
  if (out_.size() - out_begin_ > kMostOut) {
    fail(make_failure(KVL_REMOTE, "staging", "the peer does not read its staging connection"));
    return;
  }
  if (!watching_out_) flush();
}

void SideConnection::flush() {
  while (out_begin_ < out_.size()) {
    const ssize_t sent = ::send(fd.get(), &out_[out_begin_], out_.size() - out_begin_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      out_begin_ += static_cast<size_t>(sent);
    } else if (errno == EAGAIN) {
      if (!watching_out_) loop_.rewatch(this, EPOLLIN | EPOLLOUT);
      watching_out_ = true;
      return;
    } else if (errno != EINTR) {
      fail(errno_failure(KVL_LINK_DOWN, errno, "send", "the staging connection broke"));
      return;
    }
  }
  out_.clear();
  out_begin_ = 0;
  if (watching_out_) loop_.rewatch(this, EPOLLIN);
  watching_out_ = false;
}

void SideConnection::fail(const Failure &reason) {
  if (lost_) return;
  lost_ = true;
  loop_.unwatch(this);  // a broken socket reports events for ever
  handler_.on_lost(reason);
  static_cast<void>(shutdown(fd.get(), SHUT_RDWR));  // the peer learns of it now, not when this link is closed
}

}  // namespace kvlink::ascend
