// Memory of the simulated devices and what is known about host memory.
//
// The address a client gets for device memory lies in a range that is reserved PROT_NONE: the CPU faults on it. The
// bytes live at a second, hidden address of the same process. Other processes reach hidden addresses, and registered
// host memory, through process_vm_readv and process_vm_writev, so a transfer needs no help from the target's threads.
// After aclrtFree the hidden pages are gone: a late copy faults and is reported as a violation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "settings.h"

namespace cann_sim {

enum class Place {
  kUnregistered,  // ordinary host memory
  kPinned,        // aclrtMallocHost
  kRegistered,    // aclrtHostRegister
  kDevice,        // aclrtMalloc
  kMapped,        // the device's view of registered host memory: an address nobody may copy with
  kFreed,         // was device or pinned memory
};

struct Located {
  Place place = Place::kUnregistered;
  uint64_t start = 0;  // of the allocation or registration; 0 for kUnregistered
  uint64_t bytes = 0;  //
  int device = -1;     // user id for kDevice and kMapped
  bool huge = false;   // made of 2 MiB pages
};
// Where an address lies. Never fails.
SIM_API Located locate(const void *address);
// True when [address, +bytes) lies within one live allocation of device memory.
SIM_API bool in_one_allocation(const void *address, uint64_t bytes);

// aclrtMalloc and friends; return ACL codes.
SIM_API int device_malloc(int user_device, uint64_t bytes, uint32_t policy, void **address);
SIM_API int device_free(void *address);
SIM_API int host_malloc(uint64_t bytes, void **address);
SIM_API int host_free(void *address);
SIM_API int host_register(void *address, uint64_t bytes, int user_device, void **device_address, bool allow_pinned);
SIM_API int host_unregister(void *address);
SIM_API int host_device_address(void *address, void **device_address);
SIM_API void free_device_memory(int user_device);  // the device was reset

// HBM that is not a client's allocation (2 MiB a link, HIXL's pools). False when the device has no room.
SIM_API bool charge_hbm(int user_device, uint64_t bytes);
SIM_API void release_hbm(int user_device, uint64_t bytes);
SIM_API uint64_t hbm_free(int user_device);

// Copies now, in this process, between any places; a device range must lie in one live allocation (violation else).
// Only the worker of a stream and the synchronous ACL copies call these.
SIM_API int copy_local(void *to, const void *from, uint64_t bytes);
SIM_API int fill_local(void *to, int value, uint64_t bytes);

// A process that still runs: pid and start time, so that a reused pid is not mistaken for it.
struct ProcessId {
  int32_t pid = 0;
  uint64_t started = 0;
};
SIM_API ProcessId this_process();
SIM_API bool process_alive(const ProcessId &process);

// A published range: plain data that one process may send to another as bytes.
struct Exported {
  ProcessId process;
  uint64_t address = 0;  // as its owner's client knows it
  uint64_t hidden = 0;   // where the bytes are
  uint64_t bytes = 0;
  uint32_t device = 0;  // 1 = device memory
  uint32_t reserved = 0;
};
// The range must be ordinary, pinned or registered host memory, or lie in one device allocation; false otherwise.
SIM_API bool export_range(const void *address, uint64_t bytes, Exported *exported);

enum class RemoteResult {
  kOk,
  kGone,   // the process ended, or the fault "peer=drop" says so: wait the retry window, then fail
  kFault,  // the target no longer has that memory (already reported as a violation of rule 6 or 21)
};
// One-sided copies, at completion time, on a stream's worker. offset + bytes must lie in the range.
SIM_API RemoteResult remote_write(const Exported &target, uint64_t offset, const void *local, uint64_t bytes);
SIM_API RemoteResult remote_read(const Exported &source, uint64_t offset, void *local, uint64_t bytes);

// The NIC of a simulated device: listening sockets by (device address, port), private to this machine and released when
// their process ends. Plain stream sockets for the caller to use; -1 and errno on failure. EADDRINUSE when the port is
// held or named in CANN_SIM_PORTS_TAKEN; ECONNREFUSED when nobody listens.
SIM_API int nic_listen(const std::string &ip, int port);
SIM_API int nic_connect(const std::string &ip, int port);

}  // namespace cann_sim
