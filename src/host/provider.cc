// The C boundary: the function table of provider.h over the classes behind it. Nothing throws across it.
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "blob.h"
#include "engine.h"
#include "link.h"

namespace kvlink::host {
namespace {

Engine *engine_of(kvl_engine *engine) { return reinterpret_cast<Engine *>(engine); }
Link *link_of(kvl_link *link) { return reinterpret_cast<Link *>(link); }

template <typename Call>
kvl_status guarded(kvl_error *err, Call call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return report(Failure{KVL_NO_RESOURCE, 0, "allocate", "out of memory"}, err);
  } catch (const std::exception &error) {
    return report(make_failure(KVL_INTERNAL, "host", "unexpected: %s", error.what()), err);
  } catch (...) {
    return report(Failure{KVL_INTERNAL, 0, "host", "unexpected exception"}, err);
  }
}

template <typename Call>
void guarded_void(Call call) {
  static_cast<void>(guarded(nullptr, [&] {
    call();
    return static_cast<kvl_status>(KVL_OK);
  }));
}

kvl_status status_of(const Failure &failure, kvl_error *err) { return failure.ok() ? KVL_OK : report(failure, err); }

kvl_status probe(kvl_error *) { return KVL_OK; }

kvl_status engine_open(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err) {
  return guarded(err, [&] {
    if (params->struct_size < sizeof(kvl_engine_params)) {
      return report(make_failure(KVL_INVALID, "engine_open", "params of %u bytes", params->struct_size), err);
    }
    std::unique_ptr<Engine> opened;
    const Failure failure = Engine::open(*params, &opened);
    if (!failure.ok()) return report(failure, err);
    *engine = reinterpret_cast<kvl_engine *>(opened.release());
    return static_cast<kvl_status>(KVL_OK);
  });
}

void engine_close(kvl_engine *engine) {
  guarded_void([&] { delete engine_of(engine); });
}

kvl_status engine_query(kvl_engine *engine, kvl_attr *attr, kvl_error *err) {
  return guarded(err, [&] {
    if (attr->struct_size < sizeof(kvl_attr)) {
      return report(make_failure(KVL_INVALID, "engine_query", "attributes of %u bytes", attr->struct_size), err);
    }
    engine_of(engine)->query(attr);
    return static_cast<kvl_status>(KVL_OK);
  });
}

kvl_status mem_alloc(kvl_engine *engine, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  return guarded(err, [&] {
    if (kind != KVL_MEMORY_HOST) {
      return report(make_failure(KVL_UNSUPPORTED, "mem_alloc", "memory kind %u; only host memory here", kind), err);
    }
    return status_of(engine_of(engine)->regions().allocate(length, address), err);
  });
}

void mem_free(kvl_engine *engine, uint64_t address) {
  guarded_void([&] { engine_of(engine)->regions().free(address); });
}

kvl_status mem_open(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  return guarded(err, [&] {
    if (desc->struct_size < sizeof(kvl_mem_desc)) {
      return report(make_failure(KVL_INVALID, "mem_open", "description of %u bytes", desc->struct_size), err);
    }
    return status_of(engine_of(engine)->regions().open(mem, *desc), err);
  });
}

kvl_status mem_close(kvl_engine *engine, uint32_t mem, kvl_error *err) {
  return guarded(err, [&] { return status_of(engine_of(engine)->close_region(mem), err); });
}

kvl_status mem_export(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  return guarded(err, [&] {
    Region region;
    const Failure failure = engine_of(engine)->regions().copy(mem, &region);
    if (!failure.ok()) return report(failure, err);
    const RegionBlob blob = make_region_blob(region);
    return status_of(export_bytes(&blob, sizeof blob, buffer, length, "mem_export"), err);
  });
}

kvl_status link_open(kvl_engine *engine, const kvl_link_params *params, kvl_link **link, kvl_error *err) {
  return guarded(err, [&] {
    if (params->struct_size < sizeof(kvl_link_params) || params->role > KVL_ROLE_ACCEPTOR) {
      return report(
          make_failure(KVL_INVALID, "link_open", "params of %u bytes, role %u", params->struct_size, params->role),
          err);
    }
    Engine &owner = *engine_of(engine);
    auto opened = std::make_unique<Link>(owner, *params);
    {
      const Engine::IoLock io(owner);
      const Failure failure = owner.add_link(opened.get());
      if (!failure.ok()) return report(failure, err);
    }
    *link = reinterpret_cast<kvl_link *>(opened.release());
    return static_cast<kvl_status>(KVL_OK);
  });
}

kvl_status link_describe(kvl_link *link, void *buffer, uint64_t *length, kvl_error *err) {
  return guarded(err, [&] {
    const Engine &owner = link_of(link)->engine();
    const LinkBlob blob = make_link_blob(owner.options(), owner.port(), owner.boot_id(), owner.local_name());
    return status_of(export_bytes(&blob, sizeof blob, buffer, length, "link_describe"), err);
  });
}

kvl_status link_connect(kvl_link *link, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  return guarded(err, [&] { return status_of(link_of(link)->connect(blob, length, timeout_ms), err); });
}

void link_close(kvl_link *link, uint32_t grace_ms) {
  guarded_void([&] {
    link_of(link)->close(grace_ms);
    delete link_of(link);
  });
}

kvl_status rmem_open(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                     kvl_error *err) {
  return guarded(err, [&] { return status_of(link_of(link)->open_remote(rmem, blob, length, timeout_ms), err); });
}

void rmem_close(kvl_link *link, uint32_t rmem) {
  guarded_void([&] { link_of(link)->close_remote(rmem); });
}

kvl_status submit(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                  uint64_t tag, kvl_completion *done, kvl_error *err) {
  static_cast<void>(stream);  // host memory has no streams (no CAP_STREAM)
  return guarded(err, [&] { return link_of(link)->submit(operation, ranges, count, tag, done, err); });
}

kvl_status poll(kvl_engine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err) {
  return guarded(err, [&] {
    engine_of(engine)->poll(completions, count, more);
    return static_cast<kvl_status>(KVL_OK);
  });
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

kvl_status link_check(kvl_link *link, kvl_error *err) {
  return guarded(err, [&] { return status_of(link_of(link)->check(), err); });
}

void link_busy_poll(kvl_link *link, uint32_t budget_us) {
  guarded_void([&] { link_of(link)->busy_poll(budget_us); });
}

kvl_status stats(kvl_engine *engine, kvl_stat *out, uint32_t *count, kvl_error *err) {
  return guarded(err, [&] {
    engine_of(engine)->statistics(out, count);
    return static_cast<kvl_status>(KVL_OK);
  });
}

}  // namespace
}  // namespace kvlink::host

extern "C" __attribute__((visibility("default"))) kvl_status kvl_provider_init(uint32_t abi_version,
                                                                               kvl_provider *provider, kvl_error *err) {
  using namespace kvlink::host;
  if (abi_version != KVL_ABI_VERSION) {
    return report(make_failure(KVL_UNSUPPORTED, "kvl_provider_init", "ABI version %u; this provider has %d",
                               abi_version, KVL_ABI_VERSION),
                  err);
  }
  kvl_provider table{};
  table.abi_version = KVL_ABI_VERSION;
  table.wire_version = kWireVersion;
  table.path_count = 3;
  table.name = "host";
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
  table.link_check = link_check;
  table.stats = stats;
  table.link_busy_poll = link_busy_poll;
  // A loader that knows fewer slots gets those; this version has none that it could miss.
  const uint32_t room = provider->struct_size;
  const uint32_t filled = room < sizeof table ? room : static_cast<uint32_t>(sizeof table);
  table.struct_size = filled;
  std::memcpy(provider, &table, filled);
  return KVL_OK;
}
