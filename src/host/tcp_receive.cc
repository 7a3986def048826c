// The receiving half of a TCP stream: every table is checked before a byte of its payload is taken, and the payload
// goes straight into registered memory. Only what arrives together with a header passes through a small buffer.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "link.h"
#include "tcp_stream.h"

namespace kvlink::host {
namespace {

constexpr size_t kStagingBytes = 32 * 1024;
constexpr size_t kStageRead = 8 * 1024;  // asked for beyond what is needed: a whole small frame in one call
constexpr uint64_t kReceiveBudget = uint64_t{1} << 20;  // per event; epoll says at once when to go on

static_assert(kStagingBytes >= sizeof(FrameHeader) + kMaxFrameRanges * sizeof(TableEntry) + kStageRead,
              "a whole table fits");

}  // namespace

TcpStream::TcpStream(Link &link, UniqueFd socket, uint32_t index)
    : link_(link), engine_(link.engine()), index_(index), staging_(new char[kStagingBytes]) {
  fd = std::move(socket);
}

void TcpStream::on_events(uint32_t events) {
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) receive();
  if (!dead && ((events & EPOLLOUT) != 0 || !want_write_)) send_some();
}

bool TcpStream::serves(uint32_t mem) const {
  const auto names = [mem](const TableEntry &entry) { return entry.mem == mem; };
  if (sending_data_ && std::any_of(out_table_.begin(), out_table_.end(), names)) return true;
  return state_ == Receiving::kPayload && !discard_ && header_.type == static_cast<uint16_t>(FrameType::kPut) &&
         std::any_of(table_.begin(), table_.end(), names);
}

bool TcpStream::broken(const char *what) {
  engine_.stats().protocol_errors.fetch_add(1, std::memory_order_relaxed);
  link_.bring_down(
      make_failure(KVL_LINK_DOWN, "recvmsg", "the peer broke the protocol on data stream %u: %s", index_, what));
  return false;
}

void TcpStream::receive() {
  uint64_t budget = kReceiveBudget;
  while (!dead) {
    bool drained = false;
    const ssize_t got = read_more(&drained);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got < 0) {
      link_.bring_down(errno_failure(KVL_LINK_DOWN, errno, "recvmsg", "data stream %u to the peer broke", index_));
      return;
    }
    if (got == 0) {
      link_.bring_down(make_failure(KVL_LINK_DOWN, "recvmsg", "the peer closed data stream %u", index_));
      return;
    }
    if (!parse_staged() || drained || static_cast<uint64_t>(got) >= budget) return;
    budget -= static_cast<uint64_t>(got);
  }
}

// One read: the payload's targets first, then (or only) the staging buffer. *drained: the socket is empty now.
ssize_t TcpStream::read_more(bool *drained) {
  iovec pieces[kMaxFrameRanges + 1];
  size_t count = 0;
  size_t room = 0;
  if (state_ == Receiving::kPayload) {
    // The staging buffer is empty here: parse_staged gave all of it to the payload.
    if (discard_) {
      pieces[count++] = {engine_.discard_buffer(), std::min<size_t>(left_, engine_.discard_size())};
    } else {
      for (size_t i = target_at_; i < targets_.size(); ++i) pieces[count++] = targets_[i];
    }
    for (size_t i = 0; i < count; ++i) room += pieces[i].iov_len;
    if (room == left_) {
      pieces[count++] = {staging_.get(), kStageRead};
      room += kStageRead;
    }
    staged_begin_ = staged_end_ = 0;
  } else {
    if (staged_begin_ > 0) {
      std::memmove(staging_.get(), staging_.get() + staged_begin_, staged_end_ - staged_begin_);
      staged_end_ -= staged_begin_;
      staged_begin_ = 0;
    }
    const size_t needed = state_ == Receiving::kTable ? header_.count * sizeof(TableEntry) : sizeof(FrameHeader);
    const size_t size = needed + kStageRead - staged_end_;
    pieces[count++] = {staging_.get() + staged_end_, size};
    room = size;
  }
  msghdr message{};
  message.msg_iov = pieces;
  message.msg_iovlen = count;
  const ssize_t got = recvmsg(fd.get(), &message, MSG_DONTWAIT);
  engine_.stats().recvmsg_calls.fetch_add(1, std::memory_order_relaxed);
  if (got <= 0) return got;
  *drained = static_cast<size_t>(got) < room;
  size_t rest = static_cast<size_t>(got);
  if (state_ == Receiving::kPayload) {
    const size_t direct = std::min<size_t>(rest, left_);
    rest -= direct;
    if (discard_) {
      left_ -= direct;
    } else {
      static_cast<void>(consume(nullptr, direct));
    }
  }
  staged_end_ += rest;
  return got;
}

// Moves the payload on by up to `length` bytes; copies them from `data` unless they are in place already.
size_t TcpStream::consume(const char *data, size_t length) {
  length = std::min<size_t>(length, left_);
  left_ -= length;
  size_t rest = length;
  while (rest > 0 && !discard_) {
    iovec &target = targets_[target_at_];
    const size_t take = std::min(rest, target.iov_len);
    if (data != nullptr) {
      std::memcpy(target.iov_base, data, take);
      data += take;
    }
    rest -= take;
    if (take == target.iov_len) {
      ++target_at_;
    } else {
      target.iov_base = static_cast<char *>(target.iov_base) + take;
      target.iov_len -= take;
    }
  }
  return length;
}

// Handles everything that is complete in the staging buffer; false when the link went down.
bool TcpStream::parse_staged() {
  for (;;) {
    const size_t available = staged_end_ - staged_begin_;
    const char *data = staging_.get() + staged_begin_;
    if (state_ == Receiving::kHeader) {
      if (available < sizeof header_) return true;
      std::memcpy(&header_, data, sizeof header_);
      staged_begin_ += sizeof header_;
      if (!begin_frame()) return false;
    } else if (state_ == Receiving::kTable) {
      const size_t size = header_.count * sizeof(TableEntry);
      if (available < size) return true;
      table_.resize(header_.count);
      std::memcpy(table_.data(), data, size);
      staged_begin_ += size;
      if (!begin_table()) return false;
    } else {
      staged_begin_ += consume(data, available);
      if (left_ > 0) return true;
      state_ = Receiving::kHeader;
      if (!finish_payload()) return false;
    }
  }
}

bool TcpStream::begin_frame() {
  if (header_.magic != FrameHeader::kMagic) return broken("a frame does not begin with the magic number");
  if (header_.bytes > kMaxFrameBytes || header_.count > kMaxFrameRanges) return broken("a frame is too large");
  engine_.stats().frames_received.fetch_add(1, std::memory_order_relaxed);
  switch (static_cast<FrameType>(header_.type)) {
    case FrameType::kPut:
    case FrameType::kGet:
      if (header_.count == 0 || header_.bytes == 0) return broken("a request is empty");
      if (replies_.size() >= kMaxOutstanding) return broken("too many requests await their answer");
      state_ = Receiving::kTable;
      return true;
    case FrameType::kPutAck:
    case FrameType::kGetData:
      if (header_.count != 0) return broken("an answer has a table");
      return answer_arrived();
  }
  return broken("a frame has an unknown type");
}

bool TcpStream::begin_table() {
  return header_.type == static_cast<uint16_t>(FrameType::kPut) ? accept_put() : accept_get();
}

// Against what this side published: handle, access, bounds. Length 0 or a wrong sum is no access but a broken frame.
Failure TcpStream::check_table(uint32_t access_needed, bool *sums_up) const {
  RegionTable::Reader regions(engine_.regions());
  Failure failure;
  uint64_t sum = 0;
  for (const TableEntry &entry : table_) {
    sum += entry.length;
    if (entry.length == 0) sum = UINT32_MAX + uint64_t{1};
    const Region *region = regions.find(entry.mem);
    const bool allowed = region != nullptr && (region->access & access_needed) != 0 && entry.offset <= region->length &&
                         entry.length <= region->length - entry.offset;
    if (!allowed && failure.ok()) {
      failure = make_failure(KVL_DENIED, "tcp", "region %#x, offset %llu, length %u is not published for this",
                             entry.mem, static_cast<unsigned long long>(entry.offset), entry.length);
    }
  }
  *sums_up = sum == header_.bytes;
  return failure;
}

bool TcpStream::accept_put() {
  bool sums_up = false;
  refusal_ = check_table(KVL_ACCESS_WRITE, &sums_up);
  if (!sums_up) return broken("the lengths of a table do not sum up");
  discard_ = !refusal_.ok();
  targets_.clear();
  target_at_ = 0;
  if (discard_) {
    engine_.stats().denied_accesses.fetch_add(1, std::memory_order_relaxed);
  } else {
    RegionTable::Reader regions(engine_.regions());
    for (const TableEntry &entry : table_)
      targets_.push_back({regions.find(entry.mem)->base + entry.offset, entry.length});
  }
  left_ = header_.bytes;
  state_ = Receiving::kPayload;
  return true;
}

bool TcpStream::accept_get() {
  bool sums_up = false;
  const Failure failure = check_table(KVL_ACCESS_READ, &sums_up);
  if (!sums_up) return broken("the lengths of a table do not sum up");
  Reply reply;
  reply.header = {FrameHeader::kMagic, static_cast<uint16_t>(FrameType::kGetData), 0, 0, failure.status, header_.id};
  if (failure.ok()) {
    reply.header.bytes = header_.bytes;
    reply.table = table_;
  } else {
    engine_.stats().denied_accesses.fetch_add(1, std::memory_order_relaxed);
  }
  replies_.push_back(std::move(reply));
  state_ = Receiving::kHeader;
  return true;
}

bool TcpStream::answer_arrived() {
  if (requests_.empty()) return broken("an answer without a request");
  const Request &request = requests_.front();
  const bool is_ack = header_.type == static_cast<uint16_t>(FrameType::kPutAck);
  if (request.id != header_.id || request.put != is_ack) return broken("an answer to another request");
  if (header_.status == KVL_OK && header_.bytes != request.bytes) return broken("an answer of another size");
  if (header_.status != KVL_OK) {
    if (header_.bytes != 0) return broken("a refusal with a payload");
    const kvl_status status = header_.status == KVL_DENIED ? KVL_DENIED : KVL_REMOTE;
    request.job->fail(make_failure(status, is_ack ? "put" : "get",
                                   "the peer refused the access (status %d): the region is closed there, or not "
                                   "published for this",
                                   header_.status));
  }
  discard_ = false;
  left_ = 0;
  if (!is_ack && header_.status == KVL_OK) {
    targets_.resize(kMaxFrameRanges);
    target_at_ = 0;
    const uint32_t count =
        request.job->frame_targets(engine_.regions(), link_.remotes(), request.start, request.bytes, targets_.data());
    targets_.resize(count);
    left_ = header_.bytes;
    if (count == 0) {  // the core promised to keep the region open; its bytes go nowhere
      discard_ = true;
      request.job->fail(make_failure(KVL_INTERNAL, "get", "a local region was closed under its transfer"));
    }
  }
  state_ = Receiving::kPayload;  // of no bytes for an acknowledgement: finish_payload does the rest
  return true;
}

bool TcpStream::finish_payload() {
  const auto type = static_cast<FrameType>(header_.type);
  if (type == FrameType::kPut) {
    Reply reply;
    const bool done = refusal_.ok();
    reply.header = {
        FrameHeader::kMagic, static_cast<uint16_t>(FrameType::kPutAck), 0, done ? header_.bytes : 0, refusal_.status,
        header_.id};
    replies_.push_back(std::move(reply));
    if (done) engine_.stats().served_bytes.fetch_add(header_.bytes, std::memory_order_relaxed);
    return true;
  }
  const Request request = requests_.front();
  requests_.pop_front();
  request_bytes_ -= request.bytes;
  if (header_.status == KVL_OK && !discard_) {
    request.job->moved.fetch_add(request.bytes);
    engine_.stats().bytes[static_cast<uint32_t>(Path::kTcp)].fetch_add(request.bytes, std::memory_order_relaxed);
  }
  --request.job->outstanding;
  link_.settle(request.job);
  return !dead;
}

}  // namespace kvlink::host
