#include "cma.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <climits>
#include <cstring>

namespace kvlink::host {
namespace {

// Skips `bytes` of parallel arrays whose lengths agree pairwise.
void advance(iovec **local, iovec **remote, size_t *count, size_t bytes) {
  while (*count > 0 && bytes >= (*local)->iov_len) {
    bytes -= (*local)->iov_len;
    ++*local, ++*remote, --*count;
  }
  if (bytes > 0) {
    (*local)->iov_base = static_cast<char *>((*local)->iov_base) + bytes;
    (*remote)->iov_base = static_cast<char *>((*remote)->iov_base) + bytes;
    (*local)->iov_len -= bytes;
    (*remote)->iov_len -= bytes;
  }
}

}  // namespace

bool cma_probe(pid_t pid, const ProbeTarget &target) {
  if (pid <= 0 || target.address == 0) return false;
  uint8_t value[sizeof target.value] = {};
  iovec local{value, sizeof value};
  iovec remote{reinterpret_cast<void *>(target.address), sizeof value};
  return process_vm_readv(pid, &local, 1, &remote, 1, 0) == static_cast<ssize_t>(sizeof value) &&
         std::memcmp(value, target.value, sizeof value) == 0;
}

Failure cma_move(pid_t pid, bool put, iovec *local, iovec *remote, size_t count, uint64_t *moved, uint64_t *calls) {
  while (count > 0) {
    const size_t batch = std::min<size_t>(count, IOV_MAX);
    const ssize_t done = put ? process_vm_writev(pid, local, batch, remote, batch, 0)
                             : process_vm_readv(pid, local, batch, remote, batch, 0);
    ++*calls;
    if (done <= 0) {
      const int error = done < 0 ? errno : EFAULT;
      const char *site = put ? "process_vm_writev" : "process_vm_readv";
      if (error == ESRCH) return errno_failure(KVL_LINK_DOWN, error, site, "the peer process %d is gone", pid);
      return errno_failure(KVL_REMOTE, error, site,
                           "process %d, remote address %p, local address %p, %zu bytes; check that the region is "
                           "still mapped on both sides",
                           pid, remote->iov_base, local->iov_base, local->iov_len);
    }
    *moved += static_cast<uint64_t>(done);
    advance(&local, &remote, &count, static_cast<size_t>(done));
  }
  return {};
}

}  // namespace kvlink::host
