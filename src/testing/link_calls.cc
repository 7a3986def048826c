// Calls on links.
#include <unistd.h>

#include <algorithm>

#include "calls.h"
#include "rendezvous.h"

namespace kvlink_hook {
namespace {

uint32_t Remaining(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<uint32_t>(std::max<long long>(left, 1));
}

// Connect mode BOTH: both sides must be inside at the same time; then a provider of mode INITIATOR is connected by the
// initiator alone, while the acceptor stays inside until that is done.
kvl_status ConnectBoth(HookLink *link, const void *blob, uint64_t length, Clock::time_point deadline, kvl_error *err) {
  Meeting meeting(link->engine->settings.rendezvous, link->session, link->role, link->interrupt_fd);
  kvl_status status = meeting.Meet(deadline, err);
  if (status != KVL_OK) return status;
  if (link->engine->inner_mode == KVL_CONNECT_BOTH) {
    return P().link_connect(link->inner, blob, length, Remaining(deadline), err);
  }
  if (link->role == KVL_ROLE_ACCEPTOR) return meeting.Await(deadline, err);
  status = P().link_connect(link->inner, blob, length, Remaining(deadline), err);
  meeting.Tell(status == KVL_OK);
  return status;
}

}  // namespace

kvl_status LinkOpen(kvl_engine *handle, const kvl_link_params *params, kvl_link **link, kvl_error *err) {
  HookEngine *const engine = Of(handle);
  return Run(engine, "link_open", engine, err, [&] {
    auto fresh = std::make_unique<HookLink>();
    fresh->engine = engine;
    fresh->role = params->role;
    constexpr char kDigits[] = "0123456789abcdef";
    for (const uint8_t byte : params->session) {
      fresh->session += kDigits[byte >> 4];
      fresh->session += kDigits[byte & 15];
    }
    const kvl_status status = P().link_open(engine->inner, params, &fresh->inner, err);
    if (status != KVL_OK) return status;
    fresh->interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    const bool both = engine->settings.both || engine->inner_mode == KVL_CONNECT_BOTH;
    engine->ledger.LinkOpened(fresh.get(), params->role, both);
    *link = reinterpret_cast<kvl_link *>(fresh.get());
    Keep(std::move(fresh));
    return status;
  });
}

kvl_status LinkDescribe(kvl_link *handle, void *buffer, uint64_t *length, kvl_error *err) {
  HookLink *const link = Of(handle);
  return Run(link->engine, "link_describe", link, err, [&] {
    link->engine->ledger.LinkUse("link_describe", link);
    return P().link_describe(link->inner, buffer, length, err);
  });
}

kvl_status LinkConnect(kvl_link *handle, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  HookLink *const link = Of(handle);
  Ledger &ledger = link->engine->ledger;
  ledger.LinkUse("link_connect", link);
  ledger.Connecting(link);
  const kvl_status status = Run(link->engine, "link_connect", link, err, [&] {
    const Settings &settings = link->engine->settings;
    const auto start = Clock::now();
    const auto deadline = start + std::chrono::milliseconds(timeout_ms);
    if (settings.connect_ms != 0) {
      const auto until = std::min(deadline, start + std::chrono::milliseconds(settings.connect_ms));
      if (SleepUntil(until, link->interrupt_fd)) {
        return Fail(err, KVL_CANCELLED, 0, "hook:link_connect", "the connect was interrupted");
      }
      if (until == deadline) return Fail(err, KVL_TIMEOUT, 0, "hook:link_connect", "the deadline passed");
    }
    if (settings.both) return ConnectBoth(link, blob, length, deadline, err);
    return P().link_connect(link->inner, blob, length, Remaining(deadline), err);
  });
  ledger.Connected(link, status);
  return status;
}

void LinkClose(kvl_link *handle, uint32_t grace_ms) {
  HookLink *const link = Of(handle);
  HookEngine *const engine = link->engine;
  engine->ledger.LinkUse("link_close", link);
  engine->ledger.LinkClosing(link);
  engine->queue.EndLink(link);
  P().link_close(link->inner, grace_ms);
  // Completions that were taken from the provider after EndLink are due at once too.
  engine->queue.EndLink(link);
  engine->ledger.LinkClosed(link);
  engine->ledger.Call("link_close", link, KVL_OK);
  P().wake(engine->inner);
  if (link->interrupt_fd >= 0) close(link->interrupt_fd);
  link->interrupt_fd = -1;
}

kvl_status RmemOpen(kvl_link *handle, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                    kvl_error *err) {
  HookLink *const link = Of(handle);
  return Run(link->engine, "rmem_open", link, err, [&] {
    link->engine->ledger.LinkUse("rmem_open", link);
    const kvl_status status = P().rmem_open(link->inner, rmem, blob, length, timeout_ms, err);
    if (status == KVL_OK) link->engine->ledger.RmemOpened(link, rmem);
    return status;
  });
}

void RmemClose(kvl_link *handle, uint32_t rmem) {
  HookLink *const link = Of(handle);
  link->engine->ledger.LinkUse("rmem_close", link);
  link->engine->ledger.RmemClosing(link, rmem);
  link->engine->ledger.Call("rmem_close", link, KVL_OK);
  P().rmem_close(link->inner, rmem);
}

void Cancel(kvl_link *handle, uint64_t tag) {
  HookLink *const link = Of(handle);
  HookEngine *const engine = link->engine;
  engine->ledger.LinkUse("cancel", link);
  engine->ledger.Call("cancel", link, KVL_OK);
  kvl_status status = KVL_OK;
  uint64_t call = 0;
  if ((engine->settings.mask & KVL_CAP_CANCEL) != 0 || engine->faults.Next("cancel", &status, &call)) return;
  if (engine->queue.Cancel(tag)) {
    P().wake(engine->inner);
  } else if (TheInner().Has(&kvl_provider::cancel)) {
    P().cancel(link->inner, tag);
  }
}

void LinkInterrupt(kvl_link *handle) {
  HookLink *const link = Of(handle);
  link->engine->ledger.LinkUse("link_interrupt", link);
  link->engine->ledger.Call("link_interrupt", link, KVL_OK);
  if ((link->engine->settings.mask & KVL_CAP_INTERRUPT) != 0) return;
  const uint64_t one = 1;
  if (link->interrupt_fd >= 0 && write(link->interrupt_fd, &one, sizeof(one)) < 0) return;
  P().link_interrupt(link->inner);
}

kvl_status LinkCheck(kvl_link *handle, kvl_error *err) {
  HookLink *const link = Of(handle);
  return Run(link->engine, "link_check", link, err, [&] {
    link->engine->ledger.LinkUse("link_check", link);
    if ((link->engine->settings.mask & KVL_CAP_LINK_CHECK) != 0) return Masked(err, "LINK_CHECK");
    return P().link_check(link->inner, err);
  });
}

void LinkBusyPoll(kvl_link *handle, uint32_t budget_us) {
  HookLink *const link = Of(handle);
  link->engine->ledger.LinkUse("link_busy_poll", link);
  if ((link->engine->settings.mask & KVL_CAP_BUSY_POLL) != 0) return;
  P().link_busy_poll(link->inner, budget_us);
}

}  // namespace kvlink_hook
