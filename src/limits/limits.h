/* What this machine can do at best over a given list of blocks: the yardsticks of `kvlink bench`.
 *
 * Test equipment, not part of the data path. Every function is plain, single-threaded and blocking, and returns the
 * seconds it took, or a negative errno. Blocks are (local offset, remote offset, length) triples of int64, as
 * kvlink.ranges takes them; bytes go from the local to the remote base for a put, the other way for a get.
 */
#ifndef KVLINK_LIMITS_H
#define KVLINK_LIMITS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum kvm_operation { KVM_PUT = 0, KVM_GET = 1 };
enum kvm_copy_mode { KVM_COPY_MEMCPY = 0, KVM_COPY_STREAM = 1, KVM_COPY_STREAM_PREFETCH = 2, KVM_COPY_MODES = 3 };

/* One-thread copy inside this process. A mode that this processor lacks returns -ENOTSUP. */
double kvm_copy(char *local, char *remote, const int64_t *blocks, uint64_t count, int32_t operation, int32_t mode);

/* process_vm_writev or process_vm_readv, as many blocks a call as the system takes. */
double kvm_process_vm(int32_t pid, char *local, uint64_t remote, const int64_t *blocks, uint64_t count,
                      int32_t operation);
/* Lets any process of this user read and write this one's memory, where Yama would forbid it. */
void kvm_allow_process_vm(void);

/* A blocking socket stream of `bytes` from one process's buffer into the other's, `chunk` bytes a call. Both walk over
 * their buffer of `room` bytes, again from its start when it is used up. The receiver acknowledges the end. */
double kvm_stream_send(int32_t fd, const char *buffer, uint64_t room, uint64_t bytes, uint64_t chunk);
double kvm_stream_receive(int32_t fd, char *buffer, uint64_t room, uint64_t bytes, uint64_t chunk);

/* A blocking-socket put and its acknowledgement (or a get and its answer), `count` times, one block each. The client
 * stores the seconds of every exchange. The server returns once the client has had its last answer. */
double kvm_exchange_client(int32_t fd, char *local, const int64_t *blocks, uint64_t count, int32_t operation,
                           double *seconds);
double kvm_exchange_server(int32_t fd, char *remote, uint64_t room, uint64_t count);

/* Fills memory with words that depend on the seed and their place. */
void kvm_fill(char *memory, uint64_t bytes, uint64_t seed);
/* Counts the blocks of `memory` that do not hold what the other side's memory, filled with that seed, holds at their
 * place. side 0: the local offsets are those of `memory`, 1: the remote ones. */
uint64_t kvm_wrong_blocks(const char *memory, const int64_t *blocks, uint64_t count, uint64_t seed, int32_t side);
/* Clears the blocks, then returns 1 when every byte of the memory is zero, 0 when something was written beside them. */
int32_t kvm_clear_and_check(char *memory, uint64_t bytes, const int64_t *blocks, uint64_t count, int32_t side);

#ifdef __cplusplus
}
#endif

#endif /* KVLINK_LIMITS_H */
