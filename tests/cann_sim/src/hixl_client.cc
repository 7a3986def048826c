// A C++ client of hixl::Hixl behind C functions, so that Python tests can call it. Linked against the oldest release;
// what came later is looked up by its mangled name, as a portable client would.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "hixl_abi.h"

namespace {

using hixl::Hixl;

Hixl *engine(void *handle) { return static_cast<Hixl *>(handle); }

std::vector<hixl::TransferOpDesc> descs(const std::uint64_t *triples, std::uint32_t count) {
  std::vector<hixl::TransferOpDesc> list;
  for (std::uint32_t i = 0; i < count; ++i) list.push_back({triples[3 * i], triples[3 * i + 1], triples[3 * i + 2]});
  return list;
}

// A method of a later release as a function on the object; null where this release lacks it.
template <typename Function>
Function later(const char *symbol) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, symbol));
}

constexpr hixl::Status kAbsent = 0xffffffff;

}  // namespace

#define CLIENT __attribute__((visibility("default")))

extern "C" {

CLIENT void *hixl_client_new() { return new Hixl; }
CLIENT void hixl_client_delete(void *handle) { delete engine(handle); }

CLIENT hixl::Status hixl_client_initialize(void *handle, const char *name, const char *const *options,
                                           std::uint32_t count) {
  std::map<ge::AscendString, ge::AscendString> map;
  for (std::uint32_t i = 0; i < count; ++i)
    map[ge::AscendString(options[2 * i])] = ge::AscendString(options[2 * i + 1]);
  return engine(handle)->Initialize(ge::AscendString(name), map);
}
CLIENT void hixl_client_finalize(void *handle) { engine(handle)->Finalize(); }

CLIENT hixl::Status hixl_client_register(void *handle, std::uint64_t address, std::uint64_t size, int type,
                                         void **out) {
  hixl::MemDesc mem{};
  mem.addr = address;
  mem.len = size;
  return engine(handle)->RegisterMem(mem, static_cast<hixl::MemType>(type), *out);
}
CLIENT hixl::Status hixl_client_deregister(void *handle, void *memory) { return engine(handle)->DeregisterMem(memory); }

CLIENT hixl::Status hixl_client_connect(void *handle, const char *peer, int timeout_ms) {
  return engine(handle)->Connect(ge::AscendString(peer), timeout_ms);
}
CLIENT hixl::Status hixl_client_disconnect(void *handle, const char *peer, int timeout_ms) {
  return engine(handle)->Disconnect(ge::AscendString(peer), timeout_ms);
}

CLIENT hixl::Status hixl_client_transfer(void *handle, const char *peer, int operation, const std::uint64_t *triples,
                                         std::uint32_t count, int timeout_ms) {
  return engine(handle)->TransferSync(ge::AscendString(peer), static_cast<hixl::TransferOp>(operation),
                                      descs(triples, count), timeout_ms);
}
CLIENT hixl::Status hixl_client_transfer_async(void *handle, const char *peer, int operation,
                                               const std::uint64_t *triples, std::uint32_t count, void **request) {
  const hixl::TransferArgs args{};
  return engine(handle)->TransferAsync(ge::AscendString(peer), static_cast<hixl::TransferOp>(operation),
                                       descs(triples, count), args, *request);
}
CLIENT hixl::Status hixl_client_status(void *handle, void *request, int *status) {
  auto out = hixl::TransferStatus::WAITING;
  const hixl::Status code = engine(handle)->GetTransferStatus(request, out);
  *status = static_cast<int>(out);
  return code;
}
CLIENT hixl::Status hixl_client_batch_status(void *handle) {
  using Method = hixl::Status (*)(void *, const hixl::GetTransferStatusArgs &, std::vector<hixl::TransferResult> &);
  const auto method = later<Method>(
      "_ZN4hixl4Hixl17GetTransferStatusERKNS_21GetTransferStatusArgsERSt6vectorINS_14TransferResultESaIS5_EE");
  if (method == nullptr) return kAbsent;
  std::vector<hixl::TransferResult> results;
  return method(handle, hixl::GetTransferStatusArgs(), results);
}

CLIENT hixl::Status hixl_client_notify(void *handle, const char *peer, const char *name, const char *message,
                                       int timeout_ms) {
  return engine(handle)->SendNotify(ge::AscendString(peer), {ge::AscendString(name), ge::AscendString(message)},
                                    timeout_ms);
}
// Writes "name=message\n" for each; the number of notifies, or -1.
CLIENT int hixl_client_notifies(void *handle, char *text, std::size_t size) {
  std::vector<hixl::NotifyDesc> list;
  if (engine(handle)->GetNotifies(list) != hixl::kSuccess) return -1;
  std::string all;
  for (const hixl::NotifyDesc &one : list)
    all += std::string(one.name.GetString()) + "=" + one.notify_msg.GetString() + "\n";
  std::strncpy(text, all.c_str(), size - 1);
  return static_cast<int>(list.size());
}

CLIENT hixl::Status hixl_client_connect_async(void *handle, const char *peer, int timeout_ms) {
  using Method = hixl::Status (*)(void *, const ge::AscendString &, std::int32_t);
  const auto method = later<Method>("_ZN4hixl4Hixl12ConnectAsyncERKN2ge12AscendStringEi");
  return method == nullptr ? kAbsent : method(handle, ge::AscendString(peer), timeout_ms);
}
CLIENT hixl::Status hixl_client_connect_status(void *handle, const char *peer, int *status) {
  using Method = hixl::Status (*)(void *, const ge::AscendString &, hixl::AsyncConnectStatus &);
  const auto method =
      later<Method>("_ZN4hixl4Hixl21GetAsyncConnectStatusERKN2ge12AscendStringERNS_18AsyncConnectStatusE");
  if (method == nullptr) return kAbsent;
  auto out = hixl::AsyncConnectStatus::NOT_CONNECT;
  const hixl::Status code = method(handle, ge::AscendString(peer), out);
  *status = static_cast<int>(out);
  return code;
}
CLIENT hixl::Status hixl_client_capability(int feature, int *value) {
  using Method = hixl::Status (*)(hixl::FeatureType, std::int32_t &);
  const auto method = later<Method>("_ZN4hixl4Hixl13GetCapabilityENS_11FeatureTypeERi");
  return method == nullptr ? kAbsent : method(static_cast<hixl::FeatureType>(feature), *value);
}

}  // extern "C"
