// ge::AscendString and hixl::Hixl as the vendor's libraries export them, written by hand from the facts: mangled names
// and layouts are the interface. Built with the old string ABI; no std::string crosses it except inside the shared_ptr.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define CANN_SIM_CLASS __attribute__((visibility("default")))

namespace ge {

class CANN_SIM_CLASS AscendString {
 public:
  AscendString() = default;
  AscendString(const char *name);  // NOLINT: implicit in the vendor's header too
  AscendString(const char *name, std::size_t length);
  const char *GetString() const;
  std::size_t GetLength() const;
  std::size_t Find(const AscendString &other) const;
  std::size_t Hash() const;
  bool operator<(const AscendString &other) const;
  bool operator>(const AscendString &other) const;
  bool operator<=(const AscendString &other) const;
  bool operator>=(const AscendString &other) const;
  bool operator==(const AscendString &other) const;
  bool operator!=(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
};
static_assert(sizeof(AscendString) == 16 && sizeof(std::string) == 8, "the old string ABI");

}  // namespace ge

namespace hixl {

using Status = std::uint32_t;
using AscendString = ge::AscendString;
using MemHandle = void *;
using TransferReq = void *;

constexpr Status kSuccess = 0;
constexpr Status kParamInvalid = 103900;
constexpr Status kTimeout = 103901;
constexpr Status kNotConnected = 103902;
constexpr Status kAlreadyConnected = 103903;
constexpr Status kNotifyFailed = 103904;
constexpr Status kUnsupported = 103905;
constexpr Status kFailed = 503900;
constexpr Status kResourceExhausted = 203900;

enum MemType { MEM_DEVICE, MEM_HOST };
enum TransferOp { READ, WRITE };
enum class TransferStatus { WAITING, COMPLETED, TIMEOUT, FAILED };
enum class AsyncConnectStatus {
  NOT_CONNECT,
  CONNECT_PENDING,
  CONNECTING,
  CONNECTED,
  CONNECT_FAILED,
  DISCONNECT_PENDING,
  DISCONNECTING
};
enum FeatureType : std::int32_t { AUTO_CONNECT, CLIENT_SERVER_COMM };

struct MemDesc {
  std::uintptr_t addr;
  std::size_t len;
  std::uint8_t reserved[128];
};
struct TransferOpDesc {
  std::uintptr_t local_addr;
  std::uintptr_t remote_addr;
  std::size_t len;
};
// 9.1's form; in 8.5 all 128 bytes are reserved, and nothing is read from them.
struct TransferArgs {
  const void *user_data;
  std::uint8_t reserved[120];
};
struct NotifyDesc {
  AscendString name;
  AscendString notify_msg;
};
struct GetTransferStatusArgs {
  std::uint32_t max_query_count = std::numeric_limits<std::uint32_t>::max();
  bool skip_waiting = false;
  std::uint8_t reserved[123] = {};
};
struct TransferResult {
  TransferReq req;
  const void *user_data;
  TransferStatus status;
  std::uint8_t reserved[108];
};

static_assert(sizeof(MemDesc) == 144 && offsetof(MemDesc, len) == 8 && offsetof(MemDesc, reserved) == 16);
static_assert(sizeof(TransferOpDesc) == 24 && offsetof(TransferOpDesc, remote_addr) == 8 &&
              offsetof(TransferOpDesc, len) == 16);
static_assert(sizeof(TransferArgs) == 128 && alignof(TransferArgs) == 8);
static_assert(sizeof(NotifyDesc) == 32);
static_assert(sizeof(GetTransferStatusArgs) == 128 && offsetof(GetTransferStatusArgs, skip_waiting) == 4);
static_assert(sizeof(TransferResult) == 128 && offsetof(TransferResult, user_data) == 8 &&
              offsetof(TransferResult, status) == 16);
static_assert(sizeof(MemType) == 4 && sizeof(TransferOp) == 4 && sizeof(TransferStatus) == 4 &&
              sizeof(AsyncConnectStatus) == 4 && sizeof(FeatureType) == 4);

class CANN_SIM_CLASS Hixl {
 public:
  Hixl();
  ~Hixl();
  Status Initialize(const AscendString &local_engine, const std::map<AscendString, AscendString> &options);
  void Finalize();
  Status RegisterMem(const MemDesc &mem, MemType type, MemHandle &mem_handle);
  Status DeregisterMem(MemHandle mem_handle);
  Status Connect(const AscendString &remote_engine, std::int32_t timeout_in_millis = 1000);
  Status Disconnect(const AscendString &remote_engine, std::int32_t timeout_in_millis = 1000);
  Status TransferSync(const AscendString &remote_engine, TransferOp operation,
                      const std::vector<TransferOpDesc> &op_descs, std::int32_t timeout_in_millis = 1000);
  Status TransferAsync(const AscendString &remote_engine, TransferOp operation,
                       const std::vector<TransferOpDesc> &op_descs, const TransferArgs &optional_args,
                       TransferReq &req);
  Status GetTransferStatus(const TransferReq &req, TransferStatus &status);
  Status SendNotify(const AscendString &remote_engine, const NotifyDesc &notify, std::int32_t timeout_in_millis = 1000);
  Status GetNotifies(std::vector<NotifyDesc> &notifies);
  // From 9.1.
  Status ConnectAsync(const AscendString &remote_engine, std::int32_t timeout_in_millis = 1000);
  Status DisconnectAsync(const AscendString &remote_engine, std::int32_t timeout_in_millis = 1000);
  Status GetAsyncConnectStatus(const AscendString &remote_engine, AsyncConnectStatus &status);
  Status GetAsyncConnectStatus(std::map<AscendString, AsyncConnectStatus> &all);
  Status GetTransferStatus(const GetTransferStatusArgs &args, std::vector<TransferResult> &results);
  static Status GetCapability(FeatureType feature_type, std::int32_t &value);

 private:
  class HixlImpl;
  std::unique_ptr<HixlImpl> impl_;
};
static_assert(sizeof(Hixl) == 8);

}  // namespace hixl
