#include "loader.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "status.h"

namespace kvlink {
namespace {

// Stubs for optional slots, so that no caller has to test for NULL.
kvl_status missing(kvl_error *err, const char *slot) {
  return fail_at(err, KVL_UNSUPPORTED, slot, 0, "this provider does not implement %s", slot);
}
kvl_status no_mem_alloc(kvl_engine *, uint32_t, uint64_t, uint64_t *, kvl_error *err) {
  return missing(err, "mem_alloc");
}
void no_mem_free(kvl_engine *, uint64_t) {}
kvl_status no_mem_copy(kvl_engine *, uint32_t, uint64_t, void *, uint64_t, int32_t, kvl_error *err) {
  return missing(err, "mem_copy");
}
void no_cancel(kvl_link *, uint64_t) {}
void no_link_busy_poll(kvl_link *, uint32_t) {}
void no_link_interrupt(kvl_link *) {}
kvl_status no_link_check(kvl_link *, kvl_error *err) { return missing(err, "link_check"); }
kvl_status no_stats(kvl_engine *, kvl_stat *, uint32_t *, kvl_error *err) { return missing(err, "stats"); }

const char *missing_slot(const kvl_provider &table) {
#define KVLINK_SLOT(slot) \
  if (table.slot == nullptr) return #slot
  KVLINK_SLOT(probe);
  KVLINK_SLOT(engine_open);
  KVLINK_SLOT(engine_close);
  KVLINK_SLOT(engine_query);
  KVLINK_SLOT(mem_open);
  KVLINK_SLOT(mem_close);
  KVLINK_SLOT(mem_export);
  KVLINK_SLOT(link_open);
  KVLINK_SLOT(link_describe);
  KVLINK_SLOT(link_connect);
  KVLINK_SLOT(link_close);
  KVLINK_SLOT(rmem_open);
  KVLINK_SLOT(rmem_close);
  KVLINK_SLOT(submit);
  KVLINK_SLOT(poll);
  KVLINK_SLOT(wait);
  KVLINK_SLOT(wake);
#undef KVLINK_SLOT
  return nullptr;
}

void fill_optional(kve_provider &provider) {
  kvl_provider &table = provider.table;
  const auto fill = [&provider](auto &slot, auto stub, uint64_t capability) {
    if (slot != nullptr) return;
    slot = stub;
    provider.absent_caps |= capability;
  };
  fill(table.mem_alloc, no_mem_alloc, KVL_CAP_ALLOCATE);
  fill(table.mem_free, no_mem_free, KVL_CAP_ALLOCATE);
  fill(table.mem_copy, no_mem_copy, KVL_CAP_COPY);
  fill(table.cancel, no_cancel, KVL_CAP_CANCEL);
  fill(table.link_interrupt, no_link_interrupt, KVL_CAP_INTERRUPT);
  fill(table.link_check, no_link_check, KVL_CAP_LINK_CHECK);
  fill(table.stats, no_stats, KVL_CAP_STATISTICS);
  fill(table.link_busy_poll, no_link_busy_poll, KVL_CAP_BUSY_POLL);
}

kvl_status check_table(kve_provider &provider, kvl_error *err) {
  const kvl_provider &table = provider.table;
  const char *path = provider.path.c_str();
  if (table.abi_version != KVL_ABI_VERSION) {
    return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0,
                   "%s speaks provider ABI %u, this kvlink speaks %d: install a matching version", path,
                   table.abi_version, static_cast<int>(KVL_ABI_VERSION));
  }
  if (table.struct_size > sizeof(kvl_provider) || table.struct_size < offsetof(kvl_provider, probe)) {
    return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0,
                   "%s filled %u bytes of a table with room for %zu: rebuild it against this kvlink's provider.h", path,
                   table.struct_size, sizeof(kvl_provider));
  }
  if (table.name == nullptr || table.name[0] == '\0') {
    return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0, "%s gives no provider name", path);
  }
  if (const char *slot = missing_slot(table)) {
    return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0, "provider '%s' (%s) lacks the mandatory function %s",
                   table.name, path, slot);
  }
  if (table.path_count == 0 || table.path_count > 64 || table.path_names == nullptr) {
    return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0,
                   "provider '%s' (%s) names %u paths; it must name 1 to 64", table.name, path, table.path_count);
  }
  for (uint32_t i = 0; i < table.path_count; ++i) {
    if (table.path_names[i] == nullptr) {
      return fail_at(err, KVL_UNSUPPORTED, "kvl_provider_init", 0, "provider '%s' (%s): path %u has no name",
                     table.name, path, i);
    }
  }
  return KVL_OK;
}

kvl_status load(const char *path, std::unique_ptr<kve_provider> &out, kvl_error *err) {
  auto provider = std::make_unique<kve_provider>();
  provider->path = path;
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char *reason = dlerror();
    return fail_at(err, KVL_UNAVAILABLE, "dlopen", 0, "cannot load %s: %s", path,
                   reason == nullptr ? "no reason given" : reason);
  }
  const auto init = reinterpret_cast<kvl_provider_init_fn>(dlsym(library, "kvl_provider_init"));
  if (init == nullptr) {
    return fail_at(err, KVL_UNSUPPORTED, "dlsym", 0, "%s exports no kvl_provider_init: it is not a kvlink provider",
                   path);
  }
  ProviderError error;
  provider->table.struct_size = sizeof(kvl_provider);
  const kvl_status status = init(KVL_ABI_VERSION, &provider->table, &error.error);
  if (status != KVL_OK) return error.pass(status, "kvl_provider_init", path, err);
  // Whatever lies beyond what it says it filled is not a slot, even where it is not the zero that it got.
  if (provider->table.struct_size < sizeof(kvl_provider)) {
    std::memset(reinterpret_cast<char *>(&provider->table) + provider->table.struct_size, 0,
                sizeof(kvl_provider) - provider->table.struct_size);
  }
  if (const kvl_status bad = check_table(*provider, err)) return bad;
  fill_optional(*provider);
  provider->name = provider->table.name;
  provider->version = provider->table.version == nullptr ? "" : provider->table.version;
  provider->path_names.assign(provider->table.path_names, provider->table.path_names + provider->table.path_count);
  out = std::move(provider);
  return KVL_OK;
}

struct Group {
  std::string provider;
  uint64_t users = 0;
};

// Never destroyed: providers live to the end of the process, and helper threads may outlive static destructors.
struct Registry {
  std::mutex mutex;
  std::map<std::string, std::unique_ptr<kve_provider>> providers;
  std::map<std::string, Group> groups;
};
Registry &registry() {
  static auto *instance = new Registry;
  return *instance;
}

}  // namespace

kvl_status load_provider(const char *path, kve_provider **provider, kvl_error *err) {
  if (path == nullptr || path[0] == '\0' || provider == nullptr) {
    return fail(err, KVL_INVALID, "kve_provider_load needs a path and a place for the result");
  }
  std::string key = path;
  if (char *real = realpath(path, nullptr)) {
    key = real;
    free(real);
  }
  Registry &known = registry();
  std::lock_guard<std::mutex> lock(known.mutex);
  const auto found = known.providers.find(key);
  if (found != known.providers.end()) {
    *provider = found->second.get();
    return KVL_OK;
  }
  std::unique_ptr<kve_provider> loaded;
  if (const kvl_status status = load(path, loaded, err)) return status;
  *provider = loaded.get();
  known.providers.emplace(key, std::move(loaded));
  return KVL_OK;
}

kvl_status claim_exclusion_group(const std::string &group, const std::string &provider, kvl_error *err) {
  if (group.empty()) return KVL_OK;
  Registry &known = registry();
  std::lock_guard<std::mutex> lock(known.mutex);
  Group &held = known.groups[group];
  if (held.users > 0 && held.provider != provider) {
    return fail(err, KVL_BUSY,
                "provider '%s' cannot be used beside '%s' in one process (both are of group '%s'): close the channels "
                "of '%s' first, or use another process",
                provider.c_str(), held.provider.c_str(), group.c_str(), held.provider.c_str());
  }
  held.provider = provider;
  ++held.users;
  return KVL_OK;
}

void release_exclusion_group(const std::string &group) noexcept {
  if (group.empty()) return;
  Registry &known = registry();
  std::lock_guard<std::mutex> lock(known.mutex);
  const auto found = known.groups.find(group);
  if (found != known.groups.end() && found->second.users > 0) --found->second.users;
}

}  // namespace kvlink
