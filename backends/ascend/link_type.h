// RoCE or HCCS: what a link between two devices will be, by the vendor's own rules, before any vendor call is made.
#ifndef KVLINK_ASCEND_LINK_TYPE_H
#define KVLINK_ASCEND_LINK_TYPE_H

#include <cstdint>
#include <string>

#include "ascend/device.h"

namespace kvlink::ascend {

enum class LinkType : uint32_t { kRoce = 0, kHccs = 1 };
enum class LinkOption : uint32_t { kAuto = 0, kRoce = 1, kHccs = 2 };  // option `link`

const char *link_type_name(LinkType type);

// What the process's environment makes HCCL do inside a server (A2) or super-pod (A3): parsed by the vendor once, at
// the first communicator. INVALID for the combinations that the vendor refuses, naming them and the way out.
struct LinkEnvironment {
  bool intra_roce = false;
};
Failure read_link_environment(LinkEnvironment *environment);
// Makes the environment say what option `link` wants, where it says nothing; INVALID where it says the contrary.
Failure apply_link_option(LinkOption option);
// HCCL_CONNECT_TIMEOUT outside 120..7200 is refused by every communicator init: say so first.
Failure check_connect_timeout_environment();

// What one side tells the other about itself (inside its provider's blob).
struct LinkSide {
  SocFamily soc = SocFamily::kOther;
  LinkOption option = LinkOption::kAuto;
  bool intra_roce = false;
  std::string server_id;
  int64_t super_pod_id = -1;
};

LinkType effective_link(const LinkSide &self, const LinkSide &peer);

// Both sides see the same link, and it is what either option asked for. Everything that would otherwise end in a
// timeout of the vendor is refused here: contradictory environments, different SoC families, `link: hccs` between
// servers.
Failure agree_on_link(const LinkSide &self, const LinkSide &peer, LinkType *type);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_LINK_TYPE_H
