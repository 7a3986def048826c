// Calls on the engine and on memory.
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "calls.h"

namespace kvlink_hook {
namespace {

// Reachable for leak checkers.
std::mutex g_mutex;
std::vector<std::unique_ptr<HookEngine>> g_engines;
std::vector<std::unique_ptr<HookLink>> g_links;

Settings *GlobalSettings() {
  static Settings settings = [] {
    Settings fresh;
    std::string problem;  // a wrong environment is reported by engine_open, which reads it again
    ReadSettings({}, &fresh, &problem);
    return fresh;
  }();
  return &settings;
}

// Counts the calls that belong to no engine.
Faults *GlobalFaults() {
  static Faults *const faults = [] {
    static Faults fresh;
    fresh.Configure(*GlobalSettings());
    return &fresh;
  }();
  return faults;
}

// Writes a field only where the caller's struct has it.
template <typename Field>
void Patch(kvl_attr *attr, Field kvl_attr::*field, Field value) {
  const auto offset = static_cast<size_t>(reinterpret_cast<char *>(&(attr->*field)) - reinterpret_cast<char *>(attr));
  if (attr->struct_size >= offset + sizeof(Field)) attr->*field = value;
}

}  // namespace

void Keep(std::unique_ptr<HookEngine> engine) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_engines.push_back(std::move(engine));
}

void Keep(std::unique_ptr<HookLink> link) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_links.push_back(std::move(link));
}

kvl_status Probe(kvl_error *err) {
  kvl_status status = KVL_OK;
  return GlobalFaults()->Inject("probe", err, &status) ? status : P().probe(err);
}

kvl_status EngineOpen(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err) {
  try {
    kvl_status status = KVL_OK;
    std::map<std::string, std::string> own;
    std::vector<kvl_option> others;
    for (uint32_t index = 0; index < params->option_count; ++index) {
      const kvl_option &option = params->options[index];
      if (std::strncmp(option.name, "hook_", 5) == 0) {
        own[option.name] = option.value;
      } else {
        others.push_back(option);
      }
    }
    auto fresh = std::make_unique<HookEngine>();
    std::string problem;
    if (!ReadSettings(own, &fresh->settings, &problem)) return Fail(err, KVL_INVALID, 0, "hook:engine_open", problem);
    if (!fresh->settings.log.empty() && !fresh->ledger.Open(fresh->settings.log, &problem)) {
      return Fail(err, KVL_INVALID, 0, "hook:engine_open", problem);
    }
    fresh->faults.Configure(fresh->settings);
    if (fresh->faults.Inject("engine_open", err, &status)) {
      fresh->ledger.Call("engine_open", fresh.get(), status);
      return status;
    }
    kvl_engine_params inner_params = *params;
    inner_params.options = others.data();
    inner_params.option_count = static_cast<uint32_t>(others.size());
    status = P().engine_open(&inner_params, &fresh->inner, err);
    fresh->ledger.Call("engine_open", fresh.get(), status);
    if (status != KVL_OK) return status;
    kvl_attr attr{};
    attr.struct_size = sizeof(attr);
    status = P().engine_query(fresh->inner, &attr, err);
    if (status != KVL_OK) {
      P().engine_close(fresh->inner);
      return status;
    }
    fresh->inner_mode = attr.connect_mode;
    fresh->caps = attr.caps & ~fresh->settings.mask;
    *engine = reinterpret_cast<kvl_engine *>(fresh.get());
    Keep(std::move(fresh));
    return KVL_OK;
  } catch (const std::exception &problem) {
    return Fail(err, KVL_INTERNAL, 0, "hook:engine_open", problem.what());
  }
}

void EngineClose(kvl_engine *handle) {
  HookEngine *const engine = Of(handle);
  engine->ledger.EngineClosing();
  engine->ledger.Call("engine_close", engine, KVL_OK);
  P().engine_close(engine->inner);
  engine->ledger.CloseFile();
}

kvl_status EngineQuery(kvl_engine *handle, kvl_attr *attr, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "engine_query", engine, err, [&] {
    const kvl_status status = P().engine_query(engine->inner, attr, err);
    if (status != KVL_OK) return status;
    const Settings &settings = engine->settings;
    uint64_t caps = engine->caps;
    // The way round: the hook interrupts its own meeting even where the provider cannot interrupt.
    if (settings.both && (settings.mask & KVL_CAP_INTERRUPT) == 0 && TheInner().Has(&kvl_provider::link_interrupt)) {
      caps |= KVL_CAP_INTERRUPT;
    }
    Patch(attr, &kvl_attr::caps, caps);
    if (settings.both) Patch(attr, &kvl_attr::connect_mode, uint32_t{KVL_CONNECT_BOTH});
    if (settings.max_connects != 0) Patch(attr, &kvl_attr::max_connects, settings.max_connects);
    if (settings.alignment != 0) Patch(attr, &kvl_attr::alignment, settings.alignment);
    if (settings.max_ranges != 0) Patch(attr, &kvl_attr::max_ranges, settings.max_ranges);
    if (settings.max_range_bytes != 0) Patch(attr, &kvl_attr::max_range_bytes, settings.max_range_bytes);
    if (attr->struct_size >= sizeof(*attr)) engine->ledger.Limits(*attr);
    return status;
  });
}

kvl_status MemAlloc(kvl_engine *handle, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "mem_alloc", engine, err, [&] {
    if ((engine->settings.mask & KVL_CAP_ALLOCATE) != 0) return Masked(err, "ALLOCATE");
    return P().mem_alloc(engine->inner, kind, length, address, err);
  });
}

void MemFree(kvl_engine *handle, uint64_t address) {
  HookEngine *const engine = Of(handle);
  engine->ledger.EngineUse("mem_free");
  engine->ledger.Call("mem_free", engine, KVL_OK);
  P().mem_free(engine->inner, address);
}

kvl_status MemOpen(kvl_engine *handle, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "mem_open", engine, err, [&] {
    const kvl_status status = P().mem_open(engine->inner, mem, desc, err);
    if (status == KVL_OK) engine->ledger.MemOpened(mem);
    return status;
  });
}

kvl_status MemClose(kvl_engine *handle, uint32_t mem, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "mem_close", engine, err, [&] {
    engine->ledger.MemClosing(mem);
    const kvl_status status = P().mem_close(engine->inner, mem, err);
    if (status == KVL_OK) engine->ledger.MemClosed(mem);
    if (status == KVL_BUSY) engine->ledger.MemKept(mem);
    return status;
  });
}

kvl_status MemExport(kvl_engine *handle, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "mem_export", engine, err, [&] {
    engine->ledger.MemUse("mem_export", mem);
    return P().mem_export(engine->inner, mem, buffer, length, err);
  });
}

kvl_status MemCopy(kvl_engine *handle, uint32_t mem, uint64_t offset, void *host, uint64_t length, int32_t to_region,
                   kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "mem_copy", engine, err, [&] {
    if ((engine->settings.mask & KVL_CAP_COPY) != 0) return Masked(err, "COPY");
    engine->ledger.MemUse("mem_copy", mem);
    return P().mem_copy(engine->inner, mem, offset, host, length, to_region, err);
  });
}

kvl_status Stats(kvl_engine *handle, kvl_stat *out, uint32_t *count, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "stats", engine, err, [&] {
    if ((engine->settings.mask & KVL_CAP_STATISTICS) != 0) return Masked(err, "STATISTICS");
    return P().stats(engine->inner, out, count, err);
  });
}

}  // namespace kvlink_hook
