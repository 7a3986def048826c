// The provider functions of the hook, by the names of provider.h, and what they share.
#pragma once

#include <exception>
#include <memory>
#include <string>

#include "inner.h"
#include "kvlink/provider.h"
#include "objects.h"

namespace kvlink_hook {

kvl_status Probe(kvl_error *err);
kvl_status EngineOpen(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err);
void EngineClose(kvl_engine *handle);
kvl_status EngineQuery(kvl_engine *handle, kvl_attr *attr, kvl_error *err);
kvl_status MemAlloc(kvl_engine *handle, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err);
void MemFree(kvl_engine *handle, uint64_t address);
kvl_status MemOpen(kvl_engine *handle, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err);
kvl_status MemClose(kvl_engine *handle, uint32_t mem, kvl_error *err);
kvl_status MemExport(kvl_engine *handle, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err);
kvl_status MemCopy(kvl_engine *handle, uint32_t mem, uint64_t offset, void *host, uint64_t length, int32_t to_region,
                   kvl_error *err);
kvl_status LinkOpen(kvl_engine *handle, const kvl_link_params *params, kvl_link **link, kvl_error *err);
kvl_status LinkDescribe(kvl_link *handle, void *buffer, uint64_t *length, kvl_error *err);
kvl_status LinkConnect(kvl_link *handle, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err);
void LinkClose(kvl_link *handle, uint32_t grace_ms);
kvl_status RmemOpen(kvl_link *handle, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                    kvl_error *err);
void RmemClose(kvl_link *handle, uint32_t rmem);
kvl_status Submit(kvl_link *handle, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                  uint64_t tag, kvl_completion *done, kvl_error *err);
kvl_status Poll(kvl_engine *handle, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err);
void Wait(kvl_engine *handle, uint32_t timeout_ms);
void Wake(kvl_engine *handle);
void Cancel(kvl_link *handle, uint64_t tag);
void LinkInterrupt(kvl_link *handle);
kvl_status LinkCheck(kvl_link *handle, kvl_error *err);
void LinkBusyPoll(kvl_link *handle, uint32_t budget_us);
kvl_status Stats(kvl_engine *handle, kvl_stat *out, uint32_t *count, kvl_error *err);

// The wrapped provider's table.
inline const kvl_provider &P() { return TheInner().table; }

// Engines and links stay for the life of the process (objects.h says why).
void Keep(std::unique_ptr<HookEngine> engine);
void Keep(std::unique_ptr<HookLink> link);

inline kvl_status Masked(kvl_error *err, const char *what) {
  return Fail(err, KVL_UNSUPPORTED, 0, std::string("hook:") + what,
              std::string("the hook hides the capability ") + what);
}

// Runs a call: counts it, fails it when asked to, else forwards it, and logs it.
template <typename Body>
kvl_status Run(HookEngine *engine, const char *function, const void *object, kvl_error *err, Body body) noexcept {
  try {
    engine->ledger.EngineUse(function);
    kvl_status status = KVL_OK;
    if (!engine->faults.Inject(function, err, &status)) status = body();
    engine->ledger.Call(function, object, status);
    return status;
  } catch (const std::exception &problem) {
    return Fail(err, KVL_INTERNAL, 0, function, problem.what());
  }
}

}  // namespace kvlink_hook
