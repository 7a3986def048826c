// The wrapped provider: loaded once a process from KVLINK_HOOK_LIBRARY.
#pragma once

#include <string>

#include "kvlink/provider.h"

namespace kvlink_hook {

struct Inner {
  kvl_provider table{};
  // An optional slot beyond the table that the provider filled counts as absent.
  template <typename Slot>
  bool Has(Slot kvl_provider::*slot) const {
    const auto *base = reinterpret_cast<const char *>(&table);
    const auto *field = reinterpret_cast<const char *>(&(table.*slot));
    return static_cast<size_t>(field - base) + sizeof(Slot) <= table.struct_size && table.*slot != nullptr;
  }
};

// Loads the library on first use; returns NULL with a message when that is impossible.
const Inner *LoadInner(std::string *problem, kvl_status *status);

// The loaded provider. Only after LoadInner succeeded.
const Inner &TheInner();

// Makes the table that is about to be handed to the core wrong or unusual in the way that KVLINK_HOOK_TABLE names, for
// tests of the loader:
//   older         ends before the optional slots from `cancel` on; the room behind is poisoned
//   truncated     ends before `poll`; the room behind is poisoned
//   missing:SLOT  a mandatory slot is NULL
//   abi           claims another ABI version than it was asked for
//   refuse        kvl_provider_init refuses every version
//   oversized     claims more bytes than the room it was given
//   nameless      has no name
//   unterminated  refuses with an error text that does not end in NUL
// Returns the status that kvl_provider_init should answer.
kvl_status ApplyTableVariant(kvl_provider *table, uint32_t room, kvl_error *err);

}  // namespace kvlink_hook
