#include "ascend/side_connection.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace kvlink::ascend {
namespace {

constexpr size_t kLargestFrame = sizeof(SideHeader) + kMaxSideEntries * sizeof(SideEntry);
constexpr size_t kInBytes = 8 * kLargestFrame;
constexpr size_t kMostOut = 1u << 20;  // answers and requests that the peer does not take: it is broken or hostile
constexpr uint64_t kBudgetNs = 200 * 1000;

}  // namespace

SideConnection::SideConnection(EventLoop &loop, SideHandler &handler, UniqueFd socket)
    : loop_(loop), handler_(handler), in_(kInBytes) {
  fd = std::move(socket);
}

Failure SideConnection::start() { return loop_.watch(this, EPOLLIN); }

void SideConnection::on_events(uint32_t events) {
  if (lost_) return;  // reported in the batch in which it broke
  if ((events & EPOLLOUT) != 0) flush();
  if (!lost_ && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) receive();
  if (!lost_) static_cast<void>(pump(now_ns() + kBudgetNs));
}

void SideConnection::receive() {
  if (in_begin_ > 0) {
    std::memmove(in_.data(), in_.data() + in_begin_, in_end_ - in_begin_);
    in_end_ -= in_begin_;
    in_begin_ = 0;
  }
  if (in_end_ == in_.size()) return;  // the peer's own fault while its earlier frames wait to be handled
  const ssize_t got = recv(fd.get(), in_.data() + in_end_, in_.size() - in_end_, MSG_DONTWAIT);
  if (got > 0) {
    in_end_ += static_cast<size_t>(got);
  } else if (got == 0) {
    fail(make_failure(KVL_LINK_DOWN, "recv", "the peer closed the staging connection"));
  } else if (errno != EAGAIN && errno != EINTR) {
    fail(errno_failure(KVL_LINK_DOWN, errno, "recv", "the staging connection broke"));
  }
}

bool SideConnection::pump(uint64_t until_ns) {
  while (!lost_ && handle_one()) {
    if (now_ns() >= until_ns) return in_end_ - in_begin_ >= sizeof(SideHeader);
  }
  return false;
}

bool SideConnection::handle_one() {
  const size_t ready = in_end_ - in_begin_;
  if (ready < sizeof(SideHeader)) return false;
  SideHeader header;
  std::memcpy(&header, in_.data() + in_begin_, sizeof header);
  const bool request =
      header.type == static_cast<uint16_t>(SideType::kCommit) || header.type == static_cast<uint16_t>(SideType::kFetch);
  const bool answer = header.type == static_cast<uint16_t>(SideType::kAnswer);
  if (header.magic != SideHeader::kMagic || !(request ? header.count > 0 : answer && header.count == 0) ||
      header.count > kMaxSideEntries) {
    fail(make_failure(KVL_REMOTE, "staging", "the peer sent a frame of type %u with %u entries", header.type,
                      header.count));
    return false;
  }
  const size_t size = sizeof header + header.count * sizeof(SideEntry);
  if (ready < size) return false;
  SideEntry table[kMaxSideEntries];
  std::memcpy(table, in_.data() + in_begin_ + sizeof header, header.count * sizeof(SideEntry));
  in_begin_ += size;
  handler_.on_frame(header, table);
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
  static_cast<void>(shutdown(fd.get(), SHUT_RDWR));
  handler_.on_lost(reason);
}

}  // namespace kvlink::ascend
