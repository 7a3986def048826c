// Frames on a TCP data stream: a header, a table of ranges, and for PUT and GET_DATA the payload in table order.
//
// Each PUT is answered by one PUT_ACK and each GET by one GET_DATA, in the order of the requests on that stream.
#ifndef KVLINK_HOST_FRAMES_H
#define KVLINK_HOST_FRAMES_H

#include <cstddef>
#include <cstdint>

namespace kvlink::host {

enum class FrameType : uint16_t { kPut = 1, kPutAck = 2, kGet = 3, kGetData = 4 };

struct FrameHeader {
  static constexpr uint32_t kMagic = 0x464b5648;
  uint32_t magic;
  uint16_t type;   // enum FrameType
  uint16_t count;  // table entries
  uint32_t bytes;  // sum of the table's lengths; in GET_DATA the payload's
  int32_t status;  // answers: a kvl_status
  uint64_t id;     // of the request
};
static_assert(sizeof(FrameHeader) == 24, "a wire struct has no padding");

struct TableEntry {
  uint64_t offset;  // in the target's region
  uint32_t mem;     // the target's handle
  uint32_t length;
};
static_assert(sizeof(TableEntry) == 16, "a wire struct has no padding");

constexpr uint32_t kMaxFrameBytes = 1u << 20;
constexpr uint32_t kMaxFrameRanges = 1000;  // with the header, one sendmsg (IOV_MAX is 1024)
// Requests of one side that await their answer on one stream. A peer that sends more breaks the protocol.
constexpr uint32_t kMaxOutstanding = 64;

}  // namespace kvlink::host

#endif  // KVLINK_HOST_FRAMES_H
