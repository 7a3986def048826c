// The hook provider: forwards every call to the provider in KVLINK_HOOK_LIBRARY. On the way it makes calls fail on
// demand, hides capabilities, tightens limits, delays work, shows connect mode BOTH, and writes down who breaks the
// contract. It is test equipment. settings.h says what it can be told.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "calls.h"

namespace kvlink_hook {
namespace {

void FillTable(const Inner &inner, kvl_provider *table) {
  *table = kvl_provider{};
  table->struct_size = sizeof(*table);
  table->abi_version = KVL_ABI_VERSION;
  // For tests of the handshake: a peer whose provider speaks another protocol.
  const char *const wire_version = std::getenv("KVLINK_HOOK_WIRE_VERSION");
  table->wire_version = wire_version != nullptr ? static_cast<uint32_t>(std::strtoul(wire_version, nullptr, 10))
                                                : inner.table.wire_version;
  table->path_count = inner.table.path_count;
  table->name = "hook";
  table->version = inner.table.version;
  table->path_names = inner.table.path_names;
  table->probe = Probe;
  table->engine_open = EngineOpen;
  table->engine_close = EngineClose;
  table->engine_query = EngineQuery;
  table->mem_open = MemOpen;
  table->mem_close = MemClose;
  table->mem_export = MemExport;
  table->link_open = LinkOpen;
  table->link_describe = LinkDescribe;
  table->link_connect = LinkConnect;
  table->link_close = LinkClose;
  table->rmem_open = RmemOpen;
  table->rmem_close = RmemClose;
  table->submit = Submit;
  table->poll = Poll;
  table->wait = Wait;
  table->wake = Wake;
  // An optional slot is there exactly when the wrapped provider has it.
  if (inner.Has(&kvl_provider::mem_alloc)) table->mem_alloc = MemAlloc;
  if (inner.Has(&kvl_provider::mem_free)) table->mem_free = MemFree;
  if (inner.Has(&kvl_provider::mem_copy)) table->mem_copy = MemCopy;
  if (inner.Has(&kvl_provider::cancel)) table->cancel = Cancel;
  if (inner.Has(&kvl_provider::link_interrupt)) table->link_interrupt = LinkInterrupt;
  if (inner.Has(&kvl_provider::link_check)) table->link_check = LinkCheck;
  if (inner.Has(&kvl_provider::stats)) table->stats = Stats;
  if (inner.Has(&kvl_provider::link_busy_poll)) table->link_busy_poll = LinkBusyPoll;
}

}  // namespace
}  // namespace kvlink_hook

extern "C" __attribute__((visibility("default"))) kvl_status kvl_provider_init(uint32_t abi_version,
                                                                               kvl_provider *provider, kvl_error *err) {
  using kvlink_hook::Fail;
  try {
    if (abi_version != KVL_ABI_VERSION) {
      return Fail(err, KVL_UNSUPPORTED, 0, "kvl_provider_init", "the hook speaks ABI version 1");
    }
    if (provider == nullptr || provider->struct_size < offsetof(kvl_provider, cancel)) {
      return Fail(err, KVL_INVALID, 0, "kvl_provider_init", "the table has too little room");
    }
    std::string problem;
    kvl_status status = KVL_OK;
    const kvlink_hook::Inner *const inner = kvlink_hook::LoadInner(&problem, &status);
    if (inner == nullptr) return Fail(err, status, 0, "kvl_provider_init", problem);
    const uint32_t room = provider->struct_size;
    kvl_provider table;
    kvlink_hook::FillTable(*inner, &table);
    table.struct_size = std::min<uint32_t>(room, sizeof(table));
    const uint32_t filled = table.struct_size;
    status = kvlink_hook::ApplyTableVariant(&table, filled, err);
    if (status == KVL_OK) std::memcpy(provider, &table, filled);
    return status;
  } catch (const std::exception &problem) {
    return Fail(err, KVL_INTERNAL, 0, "kvl_provider_init", problem.what());
  }
}
