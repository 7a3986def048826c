#include <sys/prctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>

#include "common.h"
#include "limits.h"

#ifndef PR_SET_PTRACER
#define PR_SET_PTRACER 0x59616d61
#endif

KVM_EXPORT double kvm_process_vm(int32_t pid, char *local, uint64_t remote, const int64_t *triples, uint64_t count,
                                 int32_t operation) {
  using namespace kvlink::limits;
  constexpr size_t kBatch = IOV_MAX;
  static thread_local std::array<iovec, kBatch> here;
  static thread_local std::array<iovec, kBatch> there;
  const Block *blocks = as_blocks(triples);
  const Stopwatch watch;
  for (uint64_t done = 0; done < count;) {
    const size_t batch = static_cast<size_t>(std::min<uint64_t>(kBatch, count - done));
    int64_t bytes = 0;
    for (size_t i = 0; i < batch; ++i) {
      const Block &block = blocks[done + i];
      here[i] = {local + block.local, static_cast<size_t>(block.length)};
      there[i] = {reinterpret_cast<void *>(remote + static_cast<uint64_t>(block.remote)),
                  static_cast<size_t>(block.length)};
      bytes += block.length;
    }
    const ssize_t moved = operation == KVM_PUT ? process_vm_writev(pid, here.data(), batch, there.data(), batch, 0)
                                               : process_vm_readv(pid, here.data(), batch, there.data(), batch, 0);
    if (moved < 0) return -errno;
    if (moved != bytes) return -EIO;  // only a bad address ends such a call early
    done += batch;
  }
  return watch.seconds();
}

KVM_EXPORT void kvm_allow_process_vm(void) { prctl(PR_SET_PTRACER, -1L, 0, 0, 0); }
