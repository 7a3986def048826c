// Devices, contexts and the current context of each thread.
#include "context.h"

#include <map>
#include <mutex>
#include <vector>

#include "call.h"
#include "memory.h"
#include "stream.h"

namespace cann_sim {
namespace {

struct Device {
  int64_t references = 0;
  ContextPtr context;  // the default one
};

struct Contexts {
  std::mutex mutex;
  std::map<int, Device> devices;
  std::map<void *, ContextPtr> by_handle;
};

Contexts &contexts() {
  static Contexts *const kContexts = new Contexts;
  return *kContexts;
}

// A raw shared pointer in thread-local storage is destroyed before late calls of exiting threads; fine, they see none.
thread_local ContextPtr t_current;

ContextPtr make_context(Contexts &c, int user_device, bool is_default) {
  auto context = std::make_shared<Context>();
  context->handle = new_handle();
  context->device = user_device;
  context->is_default = is_default;
  c.by_handle[context->handle] = context;
  count_live("context", 1);
  return context;
}

void end_context(Contexts &c, const ContextPtr &context) {
  context->alive = false;
  c.by_handle.erase(context->handle);
  count_live("context", -1);
}

}  // namespace

int set_device(int user_device) {
  if (physical_id(user_device) < 0) {
    return fail(4, kRtInvalidDevice, "aclrtSetDevice(%d): there are %d visible devices", user_device, device_count());
  }
  Contexts &c = contexts();
  std::lock_guard<std::mutex> lock(c.mutex);
  Device &device = c.devices[user_device];
  if (device.references++ == 0) device.context = make_context(c, user_device, true);
  t_current = device.context;
  count_live("device_reference", 1);
  return kAclOk;
}

int reset_device(int user_device, bool force) {
  if (physical_id(user_device) < 0) {
    return fail(4, kRtInvalidDevice, "aclrtResetDevice(%d): there are %d visible devices", user_device, device_count());
  }
  Contexts &c = contexts();
  ContextPtr ended;
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    Device &device = c.devices[user_device];
    if (device.references == 0) {
      return fail(4, kRtInvalidDevice, "aclrtResetDevice(%d) without a matching aclrtSetDevice", user_device);
    }
    const int64_t released = force ? device.references : 1;
    device.references -= released;
    count_live("device_reference", -released);
    if (device.references > 0) return kAclOk;
    ended = device.context;
    device.context = nullptr;
    end_context(c, ended);
  }
  if (t_current == ended) t_current = nullptr;
  drop_context_objects(ended);
  free_device_memory(user_device);
  log_event("device_reset", "\"device\":" + std::to_string(user_device));
  return kAclOk;
}

int64_t device_references(int user_device) {
  Contexts &c = contexts();
  std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.devices.find(user_device);
  return found == c.devices.end() ? 0 : found->second.references;
}

ContextPtr current_context() {
  if (t_current != nullptr && !t_current->alive.load()) {
    violation(33, "this thread uses a context of device %d that was destroyed or reset", t_current->device);
    t_current = nullptr;
  }
  return t_current;
}

int current_device() {
  const ContextPtr context = current_context();
  return context == nullptr ? -1 : context->device;
}

ContextPtr create_context(int user_device) {
  Contexts &c = contexts();
  std::lock_guard<std::mutex> lock(c.mutex);
  return make_context(c, user_device, false);
}

int destroy_context(void *handle) {
  ContextPtr context;
  const int code = find_context(handle, &context);
  if (code != kAclOk) return code;
  if (context->is_default) return fail(5, kRtParamInvalid, "aclrtDestroyContext of a default context");
  {
    Contexts &c = contexts();
    std::lock_guard<std::mutex> lock(c.mutex);
    end_context(c, context);
  }
  if (t_current == context) t_current = nullptr;
  drop_context_objects(context);
  return kAclOk;
}

int find_context(void *handle, ContextPtr *found) {
  if (handle == nullptr) return fail(4, kRtParamInvalid, "context is null");
  Contexts &c = contexts();
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    const auto at = c.by_handle.find(handle);
    if (at != c.by_handle.end()) {
      *found = at->second;
      return kAclOk;
    }
  }
  if (was_handle(handle)) violation(33, "context %p was destroyed, or is no context", handle);
  return fail(4, kRtParamInvalid, "context %p is none of ours", handle);
}

ContextPtr default_context(int user_device) {
  Contexts &c = contexts();
  std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.devices.find(user_device);
  return found == c.devices.end() ? nullptr : found->second.context;
}

ContextPtr exchange_context(ContextPtr context) {
  ContextPtr before = std::move(t_current);
  t_current = std::move(context);
  return before;
}

}  // namespace cann_sim
