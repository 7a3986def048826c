// The function table of provider.h over Engine and Link. Nothing throws across it.
#include <cstring>
#include <memory>

#include "ascend/boundary.h"
#include "engine.h"
#include "link.h"
#include "link_blob.h"

namespace kvlink::hixl_provider {
namespace {

using ascend::answered;
using ascend::guarded;
using ascend::guarded_void;

Engine *engine_of(kvl_engine *engine) { return reinterpret_cast<Engine *>(engine); }
Link *link_of(kvl_link *link) { return reinterpret_cast<Link *>(link); }

kvl_status probe(kvl_error *err) {
  return answered(err, [] {
    const kvlink_hixl_shim *shim = nullptr;
    const Failure failure = load_vendor(&shim);
    return failure.ok() ? ascend::probe_device() : failure;
  });
}

kvl_status engine_open(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err) {
  return answered(err, [&] {
    if (params->struct_size < sizeof(kvl_engine_params)) {
      return make_failure(KVL_INVALID, "engine_open", "params of %u bytes", params->struct_size);
    }
    std::unique_ptr<Engine> opened;
    Failure failure = Engine::open(*params, &opened);
    if (failure.ok()) *engine = reinterpret_cast<kvl_engine *>(opened.release());
    return failure;
  });
}

void engine_close(kvl_engine *engine) {
  guarded_void([&] { delete engine_of(engine); });
}

kvl_status engine_query(kvl_engine *engine, kvl_attr *attr, kvl_error *err) {
  return answered(err, [&] {
    if (attr->struct_size < sizeof(kvl_attr)) {
      return make_failure(KVL_INVALID, "engine_query", "attributes of %u bytes", attr->struct_size);
    }
    engine_of(engine)->query(attr);
    return Failure{};
  });
}

kvl_status mem_alloc(kvl_engine *engine, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine)->memory().allocate(kind, length, address); });
}

void mem_free(kvl_engine *engine, uint64_t address) {
  guarded_void([&] { engine_of(engine)->free_memory(address); });
}

kvl_status mem_open(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  return answered(err, [&] {
    if (desc->struct_size < sizeof(kvl_mem_desc)) {
      return make_failure(KVL_INVALID, "mem_open", "description of %u bytes", desc->struct_size);
    }
    return engine_of(engine)->open_memory(mem, *desc);
  });
}

kvl_status mem_close(kvl_engine *engine, uint32_t mem, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine)->memory().close(mem); });
}

kvl_status mem_export(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine)->memory().describe(mem, buffer, length); });
}

kvl_status mem_copy(kvl_engine *engine, uint32_t mem, uint64_t offset, void *host, uint64_t length, int32_t to_region,
                    kvl_error *err) {
  return answered(err, [&] { return engine_of(engine)->memory().copy(mem, offset, host, length, to_region != 0); });
}

kvl_status link_open(kvl_engine *engine, const kvl_link_params *params, kvl_link **link, kvl_error *err) {
  return answered(err, [&] {
    if (params->struct_size < sizeof(kvl_link_params) || params->role > KVL_ROLE_ACCEPTOR) {
      return make_failure(KVL_INVALID, "link_open", "params of %u bytes, role %u", params->struct_size, params->role);
    }
    auto opened = std::make_unique<Link>(*engine_of(engine));
    Failure failure = opened->open(*params);
    if (failure.ok()) *link = reinterpret_cast<kvl_link *>(opened.release());
    return failure;
  });
}

kvl_status link_describe(kvl_link *link, void *buffer, uint64_t *length, kvl_error *err) {
  return answered(err, [&] { return link_of(link)->describe(buffer, length); });
}

kvl_status link_connect(kvl_link *link, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  return answered(err, [&] { return link_of(link)->connect(blob, length, timeout_ms); });
}

void link_close(kvl_link *link, uint32_t grace_ms) {
  guarded_void([&] {
    link_of(link)->close(grace_ms);
    delete link_of(link);
  });
}

kvl_status rmem_open(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t, kvl_error *err) {
  return answered(err, [&] { return link_of(link)->open_remote(rmem, blob, length); });
}

void rmem_close(kvl_link *link, uint32_t rmem) {
  guarded_void([&] { link_of(link)->close_remote(rmem); });
}

kvl_status submit(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                  uint64_t tag, kvl_completion *, kvl_error *err) {
  return guarded(err, [&] { return link_of(link)->submit(operation, ranges, count, stream, tag, err); });
}

kvl_status poll(kvl_engine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err) {
  return answered(err, [&] { return engine_of(engine)->poll(completions, count, more); });
}

void wait(kvl_engine *engine, uint32_t timeout_ms) {
  guarded_void([&] { engine_of(engine)->wait(timeout_ms); });
}

void wake(kvl_engine *engine) { engine_of(engine)->wake(); }

void cancel(kvl_link *link, uint64_t tag) {
  guarded_void([&] { link_of(link)->cancel(tag); });
}

void link_interrupt(kvl_link *link) {
  guarded_void([&] { link_of(link)->interrupt(); });
}

kvl_status stats(kvl_engine *engine, kvl_stat *out, uint32_t *count, kvl_error *err) {
  return answered(err, [&] {
    engine_of(engine)->statistics(out, count);
    return Failure{};
  });
}

}  // namespace
}  // namespace kvlink::hixl_provider

extern "C" __attribute__((visibility("default"))) kvl_status kvl_provider_init(uint32_t abi_version,
                                                                               kvl_provider *provider, kvl_error *err) {
  using namespace kvlink::hixl_provider;
  if (abi_version != KVL_ABI_VERSION) {
    return report(make_failure(KVL_UNSUPPORTED, "kvl_provider_init", "ABI version %u; this provider has %d",
                               abi_version, KVL_ABI_VERSION),
                  err);
  }
  kvl_provider table{};
  table.abi_version = KVL_ABI_VERSION;
  table.wire_version = kWireVersion;
  table.path_count = sizeof kPathNames / sizeof *kPathNames;
  table.name = "hixl";
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
