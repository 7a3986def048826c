// The C boundary: the function table of provider.h over the classes behind it. Nothing throws across it.
#include <cstddef>
#include <cstring>
#include <memory>

#include "ascend/boundary.h"
#include "engine.h"
#include "link.h"
#include "policy.h"

namespace kvlink::hcomm {
namespace {

using ascend::answered;
using ascend::guarded;
using ascend::guarded_void;
using ascend::make_failure;
using ascend::report;
using ascend::status_of;

// What the core holds: threads of the vendor may keep engine and link a little longer.
struct EngineHandle {
  std::shared_ptr<Engine> engine;
};
struct LinkHandle {
  std::shared_ptr<Link> link;
};

Engine &engine_of(kvl_engine *engine) { return *reinterpret_cast<EngineHandle *>(engine)->engine; }
Link &link_of(kvl_link *link) { return *reinterpret_cast<LinkHandle *>(link)->link; }

template <typename Struct>
kvl_status too_short(const Struct &given, const char *site, kvl_error *err) {
  return report(
      make_failure(KVL_INVALID, site, "a struct of %u bytes; expected at least %zu", given.struct_size, sizeof(Struct)),
      err);
}

kvl_status probe(kvl_error *err) {
  return answered(err, [&] { return probe_host(); });
}

kvl_status engine_open(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err) {
  return guarded(err, [&] {
    if (params->struct_size < sizeof(kvl_engine_params)) return too_short(*params, "engine_open", err);
    auto handle = std::make_unique<EngineHandle>();
    const Failure failure = Engine::open(*params, &handle->engine);
    if (!failure.ok()) return report(failure, err);
    *engine = reinterpret_cast<kvl_engine *>(handle.release());
    return static_cast<kvl_status>(KVL_OK);
  });
}

void engine_close(kvl_engine *engine) {
  guarded_void([&] {
    engine_of(engine).shut();
    delete reinterpret_cast<EngineHandle *>(engine);
  });
}

kvl_status engine_query(kvl_engine *engine, kvl_attr *attr, kvl_error *err) {
  return guarded(err, [&] {
    if (attr->struct_size < sizeof(kvl_attr)) return too_short(*attr, "engine_query", err);
    engine_of(engine).query(attr);
    return static_cast<kvl_status>(KVL_OK);
  });
}

kvl_status mem_alloc(kvl_engine *engine, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine).memory().allocate(kind, length, address); });
}

void mem_free(kvl_engine *engine, uint64_t address) {
  guarded_void([&] { engine_of(engine).memory().free(address); });
}

kvl_status mem_open(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  return guarded(err, [&] {
    if (desc->struct_size < sizeof(kvl_mem_desc)) return too_short(*desc, "mem_open", err);
    return status_of(engine_of(engine).memory().open(mem, *desc), err);
  });
}

kvl_status mem_close(kvl_engine *engine, uint32_t mem, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine).memory().close(mem); });
}

kvl_status mem_export(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine).memory().describe(mem, buffer, length); });
}

kvl_status mem_copy(kvl_engine *engine, uint32_t mem, uint64_t offset, void *host, uint64_t length, int32_t to_region,
                    kvl_error *err) {
  return answered(err, [&] { return engine_of(engine).memory().copy(mem, offset, host, length, to_region != 0); });
}

kvl_status link_open(kvl_engine *engine, const kvl_link_params *params, kvl_link **link, kvl_error *err) {
  return guarded(err, [&] {
    if (params->struct_size < sizeof(kvl_link_params)) return too_short(*params, "link_open", err);
    if (params->role > KVL_ROLE_ACCEPTOR) {
      return report(
          make_failure(KVL_INVALID, "link_open", "role %u; expected initiator (0) or acceptor (1)", params->role), err);
    }
    auto handle = std::make_unique<LinkHandle>();
    const Failure failure = Link::open(reinterpret_cast<EngineHandle *>(engine)->engine, *params, &handle->link);
    if (!failure.ok()) return report(failure, err);
    *link = reinterpret_cast<kvl_link *>(handle.release());
    return static_cast<kvl_status>(KVL_OK);
  });
}

kvl_status link_describe(kvl_link *link, void *buffer, uint64_t *length, kvl_error *err) {
  return answered(err, [&] { return link_of(link).describe(buffer, length); });
}

kvl_status link_connect(kvl_link *link, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  return answered(err, [&] { return link_of(link).connect(blob, length, timeout_ms); });
}

void link_close(kvl_link *link, uint32_t grace_ms) {
  guarded_void([&] {
    link_of(link).close(grace_ms);
    delete reinterpret_cast<LinkHandle *>(link);
  });
}

kvl_status rmem_open(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                     kvl_error *err) {
  static_cast<void>(timeout_ms);  // nothing to wait for: HCCL exchanged everything when the link was made
  return answered(err, [&] { return link_of(link).open_remote(rmem, blob, length); });
}

void rmem_close(kvl_link *link, uint32_t rmem) {
  guarded_void([&] { link_of(link).close_remote(rmem); });
}

kvl_status submit(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                  uint64_t tag, kvl_completion *done, kvl_error *err) {
  return guarded(err, [&] { return link_of(link).submit(operation, ranges, count, stream, tag, done, err); });
}

kvl_status poll(kvl_engine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err) {
  return guarded(err, [&] {
    engine_of(engine).poll(completions, count, more);
    return static_cast<kvl_status>(KVL_OK);
  });
}

void wait(kvl_engine *engine, uint32_t timeout_ms) {
  guarded_void([&] { engine_of(engine).wait(timeout_ms); });
}

void wake(kvl_engine *engine) {
  guarded_void([&] { engine_of(engine).loop().wake(); });
}

void cancel(kvl_link *link, uint64_t tag) {
  guarded_void([&] { link_of(link).cancel(tag); });
}

void link_interrupt(kvl_link *link) {
  guarded_void([&] { link_of(link).interrupt(); });
}

kvl_status stats(kvl_engine *engine, kvl_stat *out, uint32_t *count, kvl_error *err) {
  return guarded(err, [&] {
    engine_of(engine).statistics(out, count);
    return static_cast<kvl_status>(KVL_OK);
  });
}

}  // namespace
}  // namespace kvlink::hcomm

extern "C" __attribute__((visibility("default"))) kvl_status kvl_provider_init(uint32_t abi_version,
                                                                               kvl_provider *provider, kvl_error *err) {
  using namespace kvlink::hcomm;
  if (abi_version != KVL_ABI_VERSION) {
    return report(make_failure(KVL_UNSUPPORTED, "kvl_provider_init", "ABI version %u; this provider has %d",
                               abi_version, KVL_ABI_VERSION),
                  err);
  }
  kvl_provider table{};
  table.abi_version = KVL_ABI_VERSION;
  table.wire_version = kWireVersion;
  table.path_count = kPathCount;
  table.name = kPolicy.provider;
  table.version = KVLINK_VERSION;
  table.path_names = kPathNames;
  table.probe = probe;
  table.engine_open = engine_open;
  table.engine_close = engine_close;
  table.engine_query = engine_query;
  table.mem_alloc = mem_alloc;
  table.mem_free = mem_free;
  table.mem_open = mem_open;
  table.mem_close = mem_close;
  table.mem_export = mem_export;
  table.mem_copy = mem_copy;
  table.link_open = link_open;
  table.link_describe = link_describe;
  table.link_connect = link_connect;
  table.link_close = link_close;
  table.rmem_open = rmem_open;
  table.rmem_close = rmem_close;
  table.submit = submit;
  table.poll = poll;
  table.wait = wait;
  table.wake = wake;
  table.cancel = cancel;
  table.link_interrupt = link_interrupt;
  table.stats = stats;
  // A loader that knows fewer slots gets those; this version has none that it could miss.
  const uint32_t room = provider->struct_size;
  const uint32_t filled = room < sizeof table ? room : static_cast<uint32_t>(sizeof table);
  table.struct_size = filled;
  std::memcpy(provider, &table, filled);
  return KVL_OK;
}
