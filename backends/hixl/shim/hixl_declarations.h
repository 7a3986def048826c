// The vendor's C++ interface that the shim calls, declared by hand (hixl v8.5.0 to v9.1.0, metadef v8.5.0).
//
// Only what is used is declared, with the members that give the classes their size. Nothing of it is defined here: the
// names resolve against libcann_hixl.so and libmetadef.so when the shim is loaded. Special members that the vendor's
// header defines inline are forced inline, so that no library of kvlink ever defines a ge:: or hixl:: symbol.
#ifndef KVLINK_HIXL_DECLARATIONS_H
#define KVLINK_HIXL_DECLARATIONS_H

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

static_assert(_GLIBCXX_USE_CXX11_ABI == 0, "CANN's host libraries are built with the old string ABI: so is the shim");

namespace ge {

class AscendString {
 public:
  explicit AscendString(const char *name);
  [[gnu::always_inline]] inline AscendString(const AscendString &other) : name_(other.name_) {}
  [[gnu::always_inline]] inline ~AscendString() {}
  AscendString &operator=(const AscendString &) = delete;
  bool operator<(const AscendString &other) const;

 private:
  // Made, and by its own deleter destroyed, in the vendor's library; never looked into here.
  std::shared_ptr<std::string> name_;
};

}  // namespace ge

namespace hixl {

using Status = uint32_t;
using ge::AscendString;
using MemHandle = void *;
using TransferReq = void *;

enum MemType { MEM_DEVICE = 0, MEM_HOST = 1 };
enum TransferOp { READ = 0, WRITE = 1 };  // READ: the peer's memory into ours
enum class TransferStatus { WAITING = 0, COMPLETED = 1, TIMEOUT = 2, FAILED = 3 };

struct MemDesc {
  uintptr_t addr;
  size_t len;
  uint8_t reserved[128];
};

struct TransferOpDesc {
  uintptr_t local_addr;
  uintptr_t remote_addr;
  size_t len;
};

// 8.5 reserves all 128 bytes, 9.1 puts a pointer first; zeroed and passed by reference it is both.
struct TransferArgs {
  const void *user_data;
  uint8_t reserved[120];
};

class Hixl {
 public:
  Hixl();
  ~Hixl();
  Hixl(const Hixl &) = delete;
  Hixl &operator=(const Hixl &) = delete;
  Status Initialize(const AscendString &local_engine, const std::map<AscendString, AscendString> &options);
  void Finalize();
  Status RegisterMem(const MemDesc &mem, MemType type, MemHandle &mem_handle);
  Status DeregisterMem(MemHandle mem_handle);
  Status Connect(const AscendString &remote_engine, int32_t timeout_in_millis);
  Status Disconnect(const AscendString &remote_engine, int32_t timeout_in_millis);
  Status TransferAsync(const AscendString &remote_engine, TransferOp operation,
                       const std::vector<TransferOpDesc> &op_descs, const TransferArgs &optional_args,
                       TransferReq &req);
  Status GetTransferStatus(const TransferReq &req, TransferStatus &status);

 private:
  class HixlImpl;
  std::unique_ptr<HixlImpl> impl_;
};

static_assert(sizeof(AscendString) == 16 && alignof(AscendString) == 8, "ge::AscendString");
static_assert(sizeof(Hixl) == 8 && alignof(Hixl) == 8, "hixl::Hixl");
static_assert(sizeof(MemDesc) == 144 && alignof(MemDesc) == 8 && offsetof(MemDesc, addr) == 0 &&
                  offsetof(MemDesc, len) == 8 && offsetof(MemDesc, reserved) == 16,
              "hixl::MemDesc");
static_assert(sizeof(TransferOpDesc) == 24 && alignof(TransferOpDesc) == 8 &&
                  offsetof(TransferOpDesc, local_addr) == 0 && offsetof(TransferOpDesc, remote_addr) == 8 &&
                  offsetof(TransferOpDesc, len) == 16,
              "hixl::TransferOpDesc");
static_assert(sizeof(TransferArgs) == 128 && alignof(TransferArgs) == 8 && offsetof(TransferArgs, user_data) == 0 &&
                  offsetof(TransferArgs, reserved) == 8,
              "hixl::TransferArgs");
static_assert(sizeof(Status) == 4 && sizeof(MemType) == 4 && sizeof(TransferOp) == 4 && sizeof(TransferStatus) == 4 &&
                  sizeof(MemHandle) == 8 && sizeof(TransferReq) == 8,
              "hixl scalars");
static_assert(sizeof(std::vector<TransferOpDesc>) == 24 && sizeof(std::map<AscendString, AscendString>) == 48 &&
                  sizeof(std::string) == 8,
              "libstdc++ containers, old string ABI");

}  // namespace hixl

#endif  // KVLINK_HIXL_DECLARATIONS_H
