#include "ascend/link_type.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "host/suggest.h"

namespace kvlink::ascend {
namespace {

constexpr const char *kRoceVariable = "HCCL_INTRA_ROCE_ENABLE";
constexpr const char *kPcieVariable = "HCCL_INTRA_PCIE_ENABLE";
constexpr const char *kTimeoutVariable = "HCCL_CONNECT_TIMEOUT";

// -1: not set.
Failure read_switch(const char *name, int *value) {
  const char *text = std::getenv(name);
  *value = -1;
  if (text == nullptr || text[0] == '\0') return {};
  if (std::strcmp(text, "0") == 0 || std::strcmp(text, "1") == 0) {
    *value = text[0] - '0';
    return {};
  }
  return make_failure(KVL_INVALID, "environment", "%s is '%.40s'; HCCL takes 0 or 1", name, text);
}

const char *shown(int value) { return value < 0 ? "not set" : value == 0 ? "0" : "1"; }

}  // namespace

const char *link_type_name(LinkType type) { return type == LinkType::kRoce ? "RoCE" : "HCCS"; }

Failure read_link_environment(LinkEnvironment *environment) {
  int roce = -1, pcie = -1;
  Failure failure = read_switch(kRoceVariable, &roce);
  if (failure.ok()) failure = read_switch(kPcieVariable, &pcie);
  if (!failure.ok()) return failure;
  const bool refused = (roce == 0 && pcie < 0) || (pcie == 0 && roce < 0) || (roce == 1 && pcie == 1);
  if (refused) {
    return make_failure(KVL_INVALID, "environment",
                        "HCCL refuses %s %s with %s %s: set both to 0 for HCCS, only %s=1 for RoCE, or neither",
                        kRoceVariable, shown(roce), kPcieVariable, shown(pcie), kRoceVariable);
  }
  environment->intra_roce = roce == 1;
  return {};
}

Failure apply_link_option(LinkOption option) {
  LinkEnvironment environment;
  const Failure failure = read_link_environment(&environment);
  if (!failure.ok() || option == LinkOption::kAuto) return failure;
  if (option == LinkOption::kHccs) {
    if (!environment.intra_roce) return {};
    return make_failure(KVL_INVALID, "engine_open", "option link is 'hccs', but %s is 1: unset it or use link: roce",
                        kRoceVariable);
  }
  if (environment.intra_roce) return {};
  if (std::getenv(kRoceVariable) != nullptr || std::getenv(kPcieVariable) != nullptr) {
    return make_failure(KVL_INVALID, "engine_open",
                        "option link is 'roce', but %s and %s ask for HCCS: set %s=1 and unset %s, or use link: hccs",
                        kRoceVariable, kPcieVariable, kRoceVariable, kPcieVariable);
  }
  // HCCL reads it once, at the process's first communicator; later it would change nothing.
  if (setenv(kRoceVariable, "1", 0) != 0) {
    return errno_failure(KVL_NO_RESOURCE, errno, "setenv", "%s cannot be set", kRoceVariable);
  }
  return {};
}

Failure check_connect_timeout_environment() {
  const char *text = std::getenv(kTimeoutVariable);
  unsigned long long seconds = 0;
  if (text == nullptr || text[0] == '\0' || host::parse_whole(text, 120, 7200, &seconds)) return {};
  return make_failure(KVL_INVALID, "environment",
                      "%s is '%.40s'; HCCL refuses every communicator unless it is from 120 to 7200 seconds: unset it",
                      kTimeoutVariable, text);
}

LinkType effective_link(const LinkSide &self, const LinkSide &peer) {
  // The vendor decides on each side for itself; agree_on_link has made sure that both sides think the same.
  if (self.intra_roce) return LinkType::kRoce;
  switch (self.soc) {
    case SocFamily::kA2:
      return self.server_id == peer.server_id ? LinkType::kHccs : LinkType::kRoce;
    case SocFamily::kA3:
      return self.super_pod_id == peer.super_pod_id ? LinkType::kHccs : LinkType::kRoce;
    default:
      return LinkType::kRoce;
  }
}

Failure agree_on_link(const LinkSide &self, const LinkSide &peer, LinkType *type) {
  if (self.soc != peer.soc) {
    return make_failure(KVL_INVALID, "link_connect", "this side is %s, the peer %s: both must be of one SoC family",
                        soc_family_name(self.soc), soc_family_name(peer.soc));
  }
  const LinkType here = effective_link(self, peer), there = effective_link(peer, self);
  if (here != there) {
    return make_failure(KVL_INVALID, "link_connect",
                        "this side would use %s, the peer %s (%s here %s, there %s): set it the same on both sides",
                        link_type_name(here), link_type_name(there), kRoceVariable, self.intra_roce ? "1" : "not 1",
                        peer.intra_roce ? "1" : "not 1");
  }
  for (const LinkSide *side : {&self, &peer}) {
    if (side->option == LinkOption::kAuto) continue;
    const LinkType wanted = side->option == LinkOption::kRoce ? LinkType::kRoce : LinkType::kHccs;
    if (wanted == here) continue;
    return make_failure(KVL_INVALID, "link_connect",
                        "%s has option link: %s, but %s links these two devices: use link: %s",
                        side == &self ? "this side" : "the peer", wanted == LinkType::kRoce ? "roce" : "hccs",
                        link_type_name(here), here == LinkType::kRoce ? "roce" : "hccs");
  }
  *type = here;
  return {};
}

}  // namespace kvlink::ascend
