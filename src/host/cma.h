// Cross-memory attach: process_vm_readv and process_vm_writev, one copy between two address spaces.
#ifndef KVLINK_HOST_CMA_H
#define KVLINK_HOST_CMA_H

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>

#include "auth.h"
#include "failure.h"

namespace kvlink::host {

// Does a read of the peer's nonce give the nonce that it sent? Anything else means that this path is not for us.
bool cma_probe(pid_t pid, const ProbeTarget &target);

// Moves all of `remote` to `local` (get) or back (put). The arrays are changed. *moved counts also on failure.
Failure cma_move(pid_t pid, bool put, iovec *local, iovec *remote, size_t count, uint64_t *moved, uint64_t *calls);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_CMA_H
