// What stands behind the kvl_engine and kvl_link handles that the hook gives out. They are never freed: a call on a
// closed handle is then seen and named as a violation instead of being undefined.
#pragma once

#include <sys/eventfd.h>

#include <atomic>
#include <string>

#include "faults.h"
#include "kvlink/provider.h"
#include "ledger.h"
#include "queue.h"
#include "settings.h"

namespace kvlink_hook {

struct HookEngine {
  kvl_engine *inner = nullptr;
  Settings settings;
  Faults faults;
  Ledger ledger;
  Queue queue;
  uint64_t caps = 0;        // after masking
  uint32_t inner_mode = 0;  // the wrapped provider's connect mode
  std::atomic<bool> down{false};
};

struct HookLink {
  HookEngine *engine = nullptr;
  kvl_link *inner = nullptr;
  uint32_t role = 0;
  std::string session;  // hexadecimal
  int interrupt_fd = -1;
  std::atomic<bool> ending{false};
};

inline HookEngine *Of(kvl_engine *engine) { return reinterpret_cast<HookEngine *>(engine); }
inline HookLink *Of(kvl_link *link) { return reinterpret_cast<HookLink *>(link); }

}  // namespace kvlink_hook
