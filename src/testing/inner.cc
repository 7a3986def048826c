#include "inner.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "faults.h"

namespace kvlink_hook {
namespace {

std::mutex g_mutex;
Inner g_inner;
bool g_loaded = false;

struct SlotName {
  const char *name;
  size_t offset;
};

constexpr SlotName kMandatory[] = {{"probe", offsetof(kvl_provider, probe)},
                                   {"engine_open", offsetof(kvl_provider, engine_open)},
                                   {"engine_close", offsetof(kvl_provider, engine_close)},
                                   {"engine_query", offsetof(kvl_provider, engine_query)},
                                   {"mem_open", offsetof(kvl_provider, mem_open)},
                                   {"mem_close", offsetof(kvl_provider, mem_close)},
                                   {"mem_export", offsetof(kvl_provider, mem_export)},
                                   {"link_open", offsetof(kvl_provider, link_open)},
                                   {"link_describe", offsetof(kvl_provider, link_describe)},
                                   {"link_connect", offsetof(kvl_provider, link_connect)},
                                   {"link_close", offsetof(kvl_provider, link_close)},
                                   {"rmem_open", offsetof(kvl_provider, rmem_open)},
                                   {"rmem_close", offsetof(kvl_provider, rmem_close)},
                                   {"submit", offsetof(kvl_provider, submit)},
                                   {"poll", offsetof(kvl_provider, poll)},
                                   {"wait", offsetof(kvl_provider, wait)},
                                   {"wake", offsetof(kvl_provider, wake)}};

constexpr unsigned char kPoison = 0xDB;

void EndTableAt(kvl_provider *table, size_t offset, uint32_t room) {
  std::memset(reinterpret_cast<char *>(table) + offset, kPoison, room - offset);
  table->struct_size = static_cast<uint32_t>(offset);
}

}  // namespace

const Inner *LoadInner(std::string *problem, kvl_status *status) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_loaded) return &g_inner;
  *status = KVL_UNAVAILABLE;
  const char *path = std::getenv("KVLINK_HOOK_LIBRARY");
  if (path == nullptr || *path == '\0') {
    *problem = "KVLINK_HOOK_LIBRARY is not set; it names the provider library to wrap";
    return nullptr;
  }
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    *problem = dlerror();
    return nullptr;
  }
  const auto init = reinterpret_cast<kvl_provider_init_fn>(dlsym(library, "kvl_provider_init"));
  if (init == nullptr) {
    *problem = std::string(path) + " does not export kvl_provider_init";
    dlclose(library);
    return nullptr;
  }
  kvl_error inner_error{};
  inner_error.struct_size = sizeof(inner_error);
  Inner fresh;
  fresh.table.struct_size = sizeof(fresh.table);
  const kvl_status answer = init(KVL_ABI_VERSION, &fresh.table, &inner_error);
  if (answer != KVL_OK) {
    *status = answer;
    *problem = std::string(path) + ": " + inner_error.message;
    dlclose(library);
    return nullptr;
  }
  g_inner = fresh;
  g_loaded = true;
  return &g_inner;
}

const Inner &TheInner() { return g_inner; }

kvl_status ApplyTableVariant(kvl_provider *table, uint32_t room, kvl_error *err) {
  const char *variant = std::getenv("KVLINK_HOOK_TABLE");
  if (variant == nullptr || *variant == '\0') return KVL_OK;
  const std::string name = variant;
  if (name == "older") {
    EndTableAt(table, offsetof(kvl_provider, cancel), room);
  } else if (name == "truncated") {
    EndTableAt(table, offsetof(kvl_provider, poll), room);
  } else if (name.rfind("missing:", 0) == 0) {
    for (const SlotName &slot : kMandatory) {
      if (name.substr(8) == slot.name) std::memset(reinterpret_cast<char *>(table) + slot.offset, 0, sizeof(void *));
    }
  } else if (name == "abi") {
    table->abi_version = KVL_ABI_VERSION + 1;
  } else if (name == "refuse") {
    return Fail(err, KVL_UNSUPPORTED, kInjectedCode, "kvl_provider_init",
                "this provider speaks no ABI version you know");
  } else if (name == "oversized") {
    table->struct_size = room + 64;
  } else if (name == "nameless") {
    table->name = nullptr;
  } else if (name == "unterminated") {
    if (err != nullptr && err->struct_size >= sizeof(*err)) {
      err->status = KVL_UNAVAILABLE;
      std::memset(err->site, 's', sizeof(err->site));
      std::memset(err->message, 'm', sizeof(err->message));
    }
    return KVL_UNAVAILABLE;
  }
  return KVL_OK;
}

}  // namespace kvlink_hook
