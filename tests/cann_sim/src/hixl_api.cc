// hixl::Hixl's exported methods: each enters the engine's own context and gives the caller's back.
#include "hixl_abi.h"
#include "hixl_async.h"
#include "hixl_engine.h"
#include "hixl_status.h"
#include "sim.h"

namespace hixl {

using cann_sim::hixl_sim::answered;
using cann_sim::hixl_sim::AsyncConnects;
using cann_sim::hixl_sim::Engine;
using cann_sim::hixl_sim::Refused;

class Hixl::HixlImpl {
 public:
  Engine engine;
  AsyncConnects async;
};

namespace {

// The caller's thread must have a context; the engine's is current while the call runs.
class Inside {
 public:
  explicit Inside(const Engine &engine) : scoped_(checked(engine)) {}

 private:
  static cann_sim::ContextPtr checked(const Engine &engine) {
    engine.need_initialized();
    if (!cann_sim::current_context()) {
      throw Refused(4, cann_sim::kRtContextNull, "this thread has no current context (107002)");
    }
    return engine.context();
  }
  cann_sim::ScopedContext scoped_;
};

std::string text(const AscendString &string) { return {string.GetString(), string.GetLength()}; }

}  // namespace

#define HIXL_CALL(name)                                     \
  ::cann_sim::Call call(name, ::cann_sim::Needs::kNothing); \
  if (call.stop()) return static_cast<Status>(call.code())

Hixl::Hixl() : impl_(new HixlImpl) {}
Hixl::~Hixl() { Finalize(); }

Status Hixl::Initialize(const AscendString &local_engine, const std::map<AscendString, AscendString> &options) {
  HIXL_CALL("Hixl::Initialize");
  call.note("engine", text(local_engine));
  return answered(call, [&] { impl_->engine.initialize(text(local_engine), options); });
}

void Hixl::Finalize() {
  ::cann_sim::Call call("Hixl::Finalize", ::cann_sim::Needs::kNothing);
  if (call.stop()) return;
  answered(call, [&] {
    impl_->async.join();
    impl_->engine.finalize();
  });
}

Status Hixl::RegisterMem(const MemDesc &mem, MemType type, MemHandle &mem_handle) {
  HIXL_CALL("Hixl::RegisterMem");
  call.note("addr", static_cast<std::int64_t>(mem.addr))
      .note("len", static_cast<std::int64_t>(mem.len))
      .note("type", type);
  return answered(call, [&] {
    const Inside in(impl_->engine);
    mem_handle = impl_->engine.register_memory(mem.addr, mem.len, type);
  });
}

Status Hixl::DeregisterMem(MemHandle mem_handle) {
  HIXL_CALL("Hixl::DeregisterMem");
  return answered(call, [&] {
    const Inside in(impl_->engine);
    impl_->engine.deregister_memory(mem_handle);
  });
}

Status Hixl::Connect(const AscendString &remote_engine, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::Connect");
  call.note("peer", text(remote_engine)).note("timeout", timeout_in_millis);
  return answered(call, [&] {
    const Inside in(impl_->engine);
    impl_->engine.connect(text(remote_engine), timeout_in_millis);
  });
}

Status Hixl::Disconnect(const AscendString &remote_engine, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::Disconnect");
  call.note("peer", text(remote_engine));
  return answered(call, [&] {
    const Inside in(impl_->engine);
    impl_->engine.disconnect(text(remote_engine), timeout_in_millis);
  });
}

Status Hixl::TransferSync(const AscendString &remote_engine, TransferOp operation,
                          const std::vector<TransferOpDesc> &op_descs, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::TransferSync");
  call.note("descs", static_cast<std::int64_t>(op_descs.size()));
  return answered(call, [&] {
    const Inside in(impl_->engine);
    impl_->engine.transfer(text(remote_engine), operation, op_descs, timeout_in_millis);
  });
}

Status Hixl::TransferAsync(const AscendString &remote_engine, TransferOp operation,
                           const std::vector<TransferOpDesc> &op_descs, const TransferArgs &, TransferReq &req) {
  HIXL_CALL("Hixl::TransferAsync");
  call.note("descs", static_cast<std::int64_t>(op_descs.size()));
  return answered(call, [&] {
    const Inside in(impl_->engine);
    const std::uint64_t number = impl_->engine.transfer_async(text(remote_engine), operation, op_descs);
    req = reinterpret_cast<TransferReq>(number);
    call.note("req", static_cast<std::int64_t>(number));
  });
}

Status Hixl::GetTransferStatus(const TransferReq &req, TransferStatus &status) {
  HIXL_CALL("Hixl::GetTransferStatus");
  status = TransferStatus::FAILED;  // what an error return leaves
  return answered(call, [&] {
    const Inside in(impl_->engine);
    status = impl_->engine.transfer_status(reinterpret_cast<std::uint64_t>(req));
    call.note("status", static_cast<std::int64_t>(status));
  });
}

Status Hixl::SendNotify(const AscendString &remote_engine, const NotifyDesc &notify, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::SendNotify");
  return answered(call, [&] {
    const Inside in(impl_->engine);
    impl_->engine.send_notify(text(remote_engine), text(notify.name), text(notify.notify_msg), timeout_in_millis);
  });
}

Status Hixl::GetNotifies(std::vector<NotifyDesc> &notifies) {
  HIXL_CALL("Hixl::GetNotifies");
  return answered(call, [&] {
    const Inside in(impl_->engine);
    for (const auto &[name, message] : impl_->engine.take_notifies()) {
      notifies.push_back({AscendString(name.data(), name.size()), AscendString(message.data(), message.size())});
    }
  });
}

Status Hixl::ConnectAsync(const AscendString &remote_engine, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::ConnectAsync");
  return answered(call, [&] {
    const Inside in(impl_->engine);
    const std::string peer = text(remote_engine);
    const auto work = [this, peer, timeout_in_millis] {
      const cann_sim::ScopedContext own(impl_->engine.context());
      return Connect(AscendString(peer.c_str()), timeout_in_millis) == kSuccess;
    };
    if (!impl_->async.start(peer, AsyncConnectStatus::CONNECTING, AsyncConnectStatus::CONNECTED,
                            AsyncConnectStatus::CONNECT_FAILED, work)) {
      throw Refused(26, static_cast<int>(kAlreadyConnected), "a request for " + peer + " is running");
    }
  });
}

Status Hixl::DisconnectAsync(const AscendString &remote_engine, std::int32_t timeout_in_millis) {
  HIXL_CALL("Hixl::DisconnectAsync");
  return answered(call, [&] {
    const Inside in(impl_->engine);
    const std::string peer = text(remote_engine);
    const auto work = [this, peer, timeout_in_millis] {
      const cann_sim::ScopedContext own(impl_->engine.context());
      return Disconnect(AscendString(peer.c_str()), timeout_in_millis) == kSuccess;
    };
    if (!impl_->async.start(peer, AsyncConnectStatus::DISCONNECTING, AsyncConnectStatus::NOT_CONNECT,
                            AsyncConnectStatus::NOT_CONNECT, work)) {
      throw Refused(26, static_cast<int>(kParamInvalid), "a request for " + peer + " is running");
    }
  });
}

Status Hixl::GetAsyncConnectStatus(const AscendString &remote_engine, AsyncConnectStatus &status) {
  HIXL_CALL("Hixl::GetAsyncConnectStatus");
  return answered(call, [&] {
    impl_->engine.need_initialized();
    status = impl_->async.status(text(remote_engine));
  });
}

Status Hixl::GetAsyncConnectStatus(std::map<AscendString, AsyncConnectStatus> &all) {
  HIXL_CALL("Hixl::GetAsyncConnectStatus");
  return answered(call, [&] {
    impl_->engine.need_initialized();
    for (const auto &[peer, status] : impl_->async.all()) all[AscendString(peer.c_str())] = status;
  });
}

// The engine over HCCL communicators, the one simulated here, refuses the batch form.
Status Hixl::GetTransferStatus(const GetTransferStatusArgs &, std::vector<TransferResult> &) {
  HIXL_CALL("Hixl::GetTransferStatus(batch)");
  return answered(call, [&] {
    impl_->engine.need_initialized();
    throw Refused(29, static_cast<int>(kUnsupported), "the batch form is not supported by this engine");
  });
}

Status Hixl::GetCapability(FeatureType feature_type, std::int32_t &value) {
  HIXL_CALL("Hixl::GetCapability");
  return answered(call, [&] {
    if (static_cast<std::int32_t>(feature_type) < 0)
      throw Refused(26, static_cast<int>(kParamInvalid), "a negative feature");
    value = feature_type == AUTO_CONNECT ? 1 : 0;  // the client-server engine is not simulated
  });
}

}  // namespace hixl
