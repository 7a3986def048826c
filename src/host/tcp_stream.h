// One TCP connection of a link: frames out of and into registered memory, requests and answers in one stream.
#ifndef KVLINK_HOST_TCP_STREAM_H
#define KVLINK_HOST_TCP_STREAM_H

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine.h"
#include "frames.h"
#include "job.h"

namespace kvlink::host {

class Link;

class TcpStream : public Watch {
 public:
  TcpStream(Link &link, UniqueFd socket, uint32_t index);

  void on_events(uint32_t events) override;
  // Sends answers and new requests until the socket is full, the window is used up or nothing is left.
  void send_some();
  // Is a frame under way that reads or writes this side's region for the peer?
  bool serves(uint32_t mem) const;
  uint32_t index() const { return index_; }
  bool wants_write() const { return want_write_; }
  bool awaits_answer() const { return !requests_.empty(); }
  // While somebody polls this stream by hand its arrivals wake nobody.
  void lend(bool lent);

 private:
  enum class Receiving { kHeader, kTable, kPayload };

  // An answer owed to the peer; for GET_DATA with the table that it asked for.
  struct Reply {
    FrameHeader header;
    std::vector<TableEntry> table;
  };
  // A request of ours whose answer is missing.
  struct Request {
    Job *job;
    uint64_t id;
    uint32_t bytes;
    bool put;
    Cursor start;
  };

  // tcp_send.cc
  bool build_next();
  void build_acks();
  void build_data();
  bool build_request();
  void set_out(const void *head, size_t head_length, const iovec *payload, size_t count);
  bool flush();
  void want_write(bool wanted);
  void watch_again();

  // tcp_receive.cc
  void receive();
  ssize_t read_more(bool *drained);
  bool parse_staged();
  bool begin_frame();
  bool begin_table();
  bool accept_put();
  bool accept_get();
  bool answer_arrived();
  bool finish_payload();
  size_t consume(const char *data, size_t length);
  Failure check_table(uint32_t access_needed, bool *sums_up) const;
  bool broken(const char *what);

  Link &link_;
  Engine &engine_;
  const uint32_t index_;

  // Sending: one frame (or a row of acks) at a time.
  std::vector<char> head_;
  std::vector<iovec> out_;
  size_t out_at_ = 0;
  bool sending_data_ = false;          // out_ is an answer that reads our regions
  std::vector<TableEntry> out_table_;  // of that answer
  std::deque<Reply> replies_;
  std::deque<Request> requests_;
  uint64_t request_bytes_ = 0;
  uint64_t next_id_ = 1;
  bool request_turn_ = false;
  bool want_write_ = false;
  bool lent_ = false;

  // Receiving.
  std::unique_ptr<char[]> staging_;
  size_t staged_begin_ = 0, staged_end_ = 0;
  Receiving state_ = Receiving::kHeader;
  FrameHeader header_{};
  std::vector<TableEntry> table_;
  std::vector<iovec> targets_;
  size_t target_at_ = 0;
  uint64_t left_ = 0;  // of the payload
  bool discard_ = false;
  Failure refusal_;
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_TCP_STREAM_H
