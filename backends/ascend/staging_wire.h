// Frames on the side connection of a link: the requester asks the exporter to copy between the link's window and its
// staged regions. A request is a header and a table; its answer is a header. Requests may overlap; each is answered.
#ifndef KVLINK_ASCEND_STAGING_WIRE_H
#define KVLINK_ASCEND_STAGING_WIRE_H

#include <cstdint>

namespace kvlink::ascend {

constexpr uint32_t kStagingWireVersion = 1;
constexpr uint32_t kStagingStream = 3;  // host::Hello::kind of a side connection

enum class SideType : uint16_t {
  kCommit = 1,  // copy window -> regions: the vendor's PUT into the window is complete
  kFetch = 2,   // copy regions -> window: the vendor's GET comes after the answer
  kAnswer = 3
};

struct SideHeader {
  static constexpr uint32_t kMagic = 0x53564b41;  // "AKVS"
  uint32_t magic;
  uint16_t type;   // enum SideType
  uint16_t count;  // table entries; 0 in an answer
  uint64_t id;     // of the request
  uint64_t window_offset;
  int32_t status;  // answers: a kvl_status
  uint32_t reserved;
};
static_assert(sizeof(SideHeader) == 32, "a wire struct has no padding");

// The entries' bytes lie one after the other in the window, from window_offset on.
struct SideEntry {
  uint64_t offset;  // in the exporter's region
  uint32_t mem;     // the exporter's handle
  uint32_t length;
};
static_assert(sizeof(SideEntry) == 16, "a wire struct has no padding");

constexpr uint32_t kMaxSideEntries = 256;

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_STAGING_WIRE_H
