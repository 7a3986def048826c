// hixl::Hixl behind C. Nothing throws across; nothing but C types crosses.
//
// The C++ runtime is the shared one, as the vendor's: exceptions and reference counts pass between the two.
#include <new>
#include <utility>

#include "hixl_declarations.h"
#include "shim_api.h"

struct kvlink_hixl {
  hixl::Hixl engine;
};

struct kvlink_hixl_remote {
  explicit kvlink_hixl_remote(const char *engine) : name(engine) {}
  ge::AscendString name;
  std::vector<hixl::TransferOpDesc> batch;
};

namespace {

static_assert(sizeof(kvlink_hixl_desc) == sizeof(hixl::TransferOpDesc) &&
                  offsetof(kvlink_hixl_desc, local) == offsetof(hixl::TransferOpDesc, local_addr) &&
                  offsetof(kvlink_hixl_desc, remote) == offsetof(hixl::TransferOpDesc, remote_addr) &&
                  offsetof(kvlink_hixl_desc, length) == offsetof(hixl::TransferOpDesc, len),
              "a batch is filled in place");

template <typename Call>
uint32_t guarded(Call call) {
  try {
    return call();
  } catch (...) {
    return KVLINK_HIXL_EXCEPTION;
  }
}

template <typename Make>
auto made(Make make) -> decltype(make()) {
  try {
    return make();
  } catch (...) {
    return nullptr;
  }
}

kvlink_hixl *create() {
  return made([] { return new kvlink_hixl; });
}

uint32_t initialize(kvlink_hixl *hixl, const char *local_engine, const kvlink_hixl_option *options,
                    uint32_t option_count) {
  return guarded([&] {
    std::map<ge::AscendString, ge::AscendString> map;
    for (uint32_t i = 0; i < option_count; ++i) {
      map.emplace(ge::AscendString(options[i].name), ge::AscendString(options[i].value));
    }
    return hixl->engine.Initialize(ge::AscendString(local_engine), map);
  });
}

void finalize(kvlink_hixl *hixl) {
  static_cast<void>(guarded([&] {
    hixl->engine.Finalize();
    return 0u;
  }));
}

void destroy(kvlink_hixl *hixl) {
  static_cast<void>(guarded([&] {
    delete hixl;
    return 0u;
  }));
}

uint32_t register_memory(kvlink_hixl *hixl, uint64_t address, uint64_t length, int32_t is_device, void **handle) {
  return guarded([&] {
    hixl::MemDesc desc{};
    desc.addr = address;
    desc.len = length;
    *handle = nullptr;
    return hixl->engine.RegisterMem(desc, is_device != 0 ? hixl::MEM_DEVICE : hixl::MEM_HOST, *handle);
  });
}

uint32_t deregister_memory(kvlink_hixl *hixl, void *handle) {
  return guarded([&] { return hixl->engine.DeregisterMem(handle); });
}

kvlink_hixl_remote *remote_create(const char *engine) {
  return made([&] { return new kvlink_hixl_remote(engine); });
}

void remote_destroy(kvlink_hixl_remote *remote) { delete remote; }

uint32_t connect(kvlink_hixl *hixl, const kvlink_hixl_remote *remote, int32_t timeout_ms) {
  return guarded([&] { return hixl->engine.Connect(remote->name, timeout_ms); });
}

uint32_t disconnect(kvlink_hixl *hixl, const kvlink_hixl_remote *remote, int32_t timeout_ms) {
  return guarded([&] { return hixl->engine.Disconnect(remote->name, timeout_ms); });
}

kvlink_hixl_desc *batch(kvlink_hixl_remote *remote, uint32_t count) {
  return made([&] {
    remote->batch.resize(count);
    return reinterpret_cast<kvlink_hixl_desc *>(remote->batch.data());
  });
}

uint32_t transfer(kvlink_hixl *hixl, kvlink_hixl_remote *remote, int32_t is_put, void **request) {
  return guarded([&] {
    const hixl::TransferArgs arguments{};
    return hixl->engine.TransferAsync(remote->name, is_put != 0 ? hixl::WRITE : hixl::READ, remote->batch, arguments,
                                      *request);
  });
}

uint32_t transfer_status(kvlink_hixl *hixl, void *request, uint32_t *state) {
  return guarded([&] {
    auto known = static_cast<hixl::TransferStatus>(*state);
    const hixl::Status status = hixl->engine.GetTransferStatus(request, known);
    *state = static_cast<uint32_t>(known);
    return status;
  });
}

constexpr kvlink_hixl_shim kTable = {sizeof(kvlink_hixl_shim),
                                     KVLINK_HIXL_SHIM_VERSION,
                                     create,
                                     initialize,
                                     finalize,
                                     destroy,
                                     register_memory,
                                     deregister_memory,
                                     remote_create,
                                     remote_destroy,
                                     connect,
                                     disconnect,
                                     batch,
                                     transfer,
                                     transfer_status};

}  // namespace

extern "C" __attribute__((visibility("default"))) const kvlink_hixl_shim *kvlink_hixl_shim_table(void) {
  return &kTable;
}
