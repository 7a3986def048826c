/* The engine's C API: what the Python core binds through cffi (ABI mode, libkvlink_engine.so).
 *
 * One kve_channel is one open provider engine with one thread of its own. That thread owns progress, deadlines and
 * completions, needs no Python, and sleeps in the provider's wait when there is nothing to do. Every function here is
 * thread-safe; none calls Python. Functions that may block say so and take a timeout. Status codes, kvl_error and
 * kvl_range are those of provider.h. Handles are reference counted: a released handle may not be used again, and a
 * child after fork may use none (kve_* returns KVL_STATE there, closers return at once).
 */
#ifndef KVLINK_ENGINE_H
#define KVLINK_ENGINE_H

#include "kvlink/provider.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kve_provider kve_provider;
typedef struct kve_channel kve_channel;
typedef struct kve_peer kve_peer;
typedef struct kve_transfer kve_transfer;

/* ---- providers: loaded once, RTLD_NOW | RTLD_LOCAL, never unloaded ---- */
/* Rejects a library without the symbol, with another ABI, or with a missing mandatory slot, naming it. Optional slots
 * that are NULL become stubs that answer UNSUPPORTED. */
kvl_status kve_provider_load(const char *path, kve_provider **provider, kvl_error *err);
const char *kve_provider_name(const kve_provider *provider);
const char *kve_provider_version(const kve_provider *provider);
uint32_t kve_provider_wire_version(const kve_provider *provider);
uint32_t kve_provider_path_count(const kve_provider *provider);
const char *kve_provider_path_name(const kve_provider *provider, uint32_t path);
kvl_status kve_provider_probe(const kve_provider *provider, kvl_error *err);

/* ---- channels ---- */
typedef struct kve_channel_params {
  uint32_t struct_size;
  uint32_t default_timeout_ms; /* deadline of a transfer whose caller gave none */
  uint32_t cancel_grace_ms;    /* after a deadline: how long a cancel may take before the link is closed */
  uint32_t option_count;
  const kvl_option *options;
  const char *device;
} kve_channel_params;

kvl_status kve_channel_open(kve_provider *provider, const kve_channel_params *params, kve_channel **channel,
                            kvl_error *err);
kvl_status kve_channel_query(kve_channel *channel, kvl_attr *attr, kvl_error *err);
/* Readable (an eventfd) while kve_channel_drain has something to give. Owned by the channel. */
int kve_channel_event_fd(kve_channel *channel);
/* Ids (kve_transfer_id) of finished transfers submitted with KVE_NOTIFY, each given once. Returns their number; also
 * clears the event fd when all were given. */
uint32_t kve_channel_drain(kve_channel *channel, uint64_t *ids, uint32_t capacity);
/* Closes peers, then memory, then the engine; ends every transfer. Blocks up to about grace_ms. Idempotent. If a
 * provider call hangs, the channel is abandoned (its thread and memory leaked, on purpose) and KVL_TIMEOUT returned. */
kvl_status kve_channel_close(kve_channel *channel, uint32_t grace_ms, kvl_error *err);
void kve_channel_release(kve_channel *channel);

typedef struct kve_statistics {
  uint32_t struct_size;
  uint32_t peers;
  uint64_t in_flight; /* transfers */
  uint64_t submitted, succeeded, failed, cancelled, timed_out;
  uint64_t put_bytes, get_bytes;  /* of transfers that succeeded */
  uint64_t ranges_in, ranges_out; /* before and after coalescing */
} kve_statistics;
kvl_status kve_channel_statistics(kve_channel *channel, kve_statistics *out);
/* The provider's own counters. */
kvl_status kve_channel_provider_stats(kve_channel *channel, kvl_stat *out, uint32_t *count, kvl_error *err);

/* ---- memory ---- */
kvl_status kve_mem_alloc(kve_channel *channel, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err);
void kve_mem_free(kve_channel *channel, uint64_t address);
kvl_status kve_mem_open(kve_channel *channel, const kvl_mem_desc *desc, uint32_t *mem, kvl_error *err);
kvl_status kve_mem_export(kve_channel *channel, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err);
/* New transfers that name it are refused at once; those in flight are cancelled and awaited up to timeout_ms, then
 * TIMEOUT is returned and nothing is closed (call again after closing the peers concerned). */
kvl_status kve_mem_close(kve_channel *channel, uint32_t mem, uint32_t timeout_ms, kvl_error *err);
kvl_status kve_mem_copy(kve_channel *channel, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                        int32_t to_region, kvl_error *err);

/* ---- peers: one link each ---- */
kvl_status kve_peer_open(kve_channel *channel, const kvl_link_params *params, kve_peer **peer, kvl_error *err);
kvl_status kve_peer_describe(kve_peer *peer, void *buffer, uint64_t *length, kvl_error *err);
kvl_status kve_peer_connect(kve_peer *peer, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err);
void kve_peer_interrupt(kve_peer *peer);
/* OK, or why the link is dead. */
kvl_status kve_peer_check(kve_peer *peer, kvl_error *err);
/* Marks the link lost: its transfers end with `status` and `message`, then the link is closed. Idempotent; blocks up to
 * about grace_ms. */
void kve_peer_close(kve_peer *peer, kvl_status status, const char *message, uint32_t grace_ms);
void kve_peer_release(kve_peer *peer);

/* Import a region: `length` and `access` are what the peer published; submits are checked against them. */
kvl_status kve_rmem_open(kve_peer *peer, const void *blob, uint64_t blob_length, uint64_t length, uint32_t access,
                         uint32_t timeout_ms, uint32_t *rmem, kvl_error *err);
/* The peer withdraws it: as kve_mem_close. OK means that nothing on this side touches it any more. */
kvl_status kve_rmem_close(kve_peer *peer, uint32_t rmem, uint32_t timeout_ms, kvl_error *err);

/* ---- transfers ---- */
enum { KVE_NOTIFY = 1 }; /* report its end through the event fd */

/* Checks every range (handles, access, bounds, overflow, alignment; INVALID names the first bad one by index and
 * values), coalesces neighbours, and submits; never blocks. ranges may be freed on return. timeout_ms 0 = the
 * channel's default. A batch of no ranges, or of ranges of length 0 only, completes at once. On AGAIN from the
 * provider the engine's thread retries: the caller never sees it. */
kvl_status kve_submit(kve_peer *peer, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                      uint32_t timeout_ms, uint32_t flags, kve_transfer **transfer, kvl_error *err);
uint64_t kve_transfer_id(const kve_transfer *transfer);
/* 1 when finished. Never blocks. */
int32_t kve_transfer_done(const kve_transfer *transfer);
/* Waits up to timeout_ms (drives progress itself for the first microseconds): 1 when finished, 0 when not yet. */
int32_t kve_transfer_wait(kve_transfer *transfer, uint32_t timeout_ms);
/* Report its end through the event fd from now on; at once when it has finished already. */
void kve_transfer_notify(kve_transfer *transfer);
void kve_transfer_cancel(kve_transfer *transfer);

typedef struct kve_result {
  uint32_t struct_size;
  kvl_status status; /* KVL_OK, or why not; KVL_AGAIN while unfinished */
  uint32_t path;     /* index of kve_provider_path_name: the slowest way that a part of it took */
  uint32_t reserved;
  int64_t vendor_code;
  uint64_t bytes;       /* moved */
  uint64_t ranges;      /* after coalescing */
  uint64_t duration_ns; /* from submit to completion */
  char site[48];
  char message[448];
} kve_result;
kvl_status kve_transfer_result(const kve_transfer *transfer, kve_result *out);
/* The transfer goes on; its memory does not depend on this handle. */
void kve_transfer_release(kve_transfer *transfer);

#ifdef __cplusplus
}
#endif

#endif /* KVLINK_ENGINE_H */
