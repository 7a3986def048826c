// A connection of the vendor's: who may be inside a call of it shares it.
#ifndef KVLINK_HIXL_SESSION_H
#define KVLINK_HIXL_SESSION_H

#include <memory>
#include <string>

#include "link.h"

namespace kvlink::hixl_provider {

struct Link::Session {
  std::shared_ptr<HixlEngine> hixl;
  std::shared_ptr<Names::Hold> hold;
  std::string name;
  RemoteEngine remote;

  uint32_t connect(int32_t timeout_ms) { return hixl->shim().connect(hixl->get(), remote.get(), timeout_ms); }
  uint32_t disconnect(int32_t timeout_ms) { return hixl->shim().disconnect(hixl->get(), remote.get(), timeout_ms); }
};

}  // namespace kvlink::hixl_provider

#endif  // KVLINK_HIXL_SESSION_H
