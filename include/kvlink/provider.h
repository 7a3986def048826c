/* kvlink provider contract, C ABI version 1.
 *
 * A provider is a shared library that moves bytes between registered local memory and the registered memory of a
 * connected peer. It is the data plane and nothing else: names, handshakes, policy and deadlines belong to the
 * core, which carries the provider's blobs to the peer. A provider exports exactly one symbol, kvl_provider_init.
 *
 * THREADS
 *   1. Any call may come from any thread. A provider that sets a per-thread device context restores the caller's.
 *   2. poll is never run by two threads at once. wait is called by one thread (the core's) and may overlap every
 *      other call, poll included. wake may be called from any thread at any time until engine_close.
 *   3. submit calls on one link are serialised by the core; they may overlap poll, wait and calls on other handles.
 *   4. link_connect and rmem_open may block up to their timeout. They run with no core lock held and may overlap
 *      calls on every other handle; on their own link only link_interrupt may overlap link_connect.
 *   5. cancel, link_interrupt, link_check and link_busy_poll may come from any thread.
 *   6. submit, poll, cancel and wake never block: bounded work, no wait on a peer, a lock held across I/O or a sleep.
 *   7. A provider never calls back, prints, exits, aborts, or installs signal handlers. Nothing throws across this
 *      boundary. After fork() the child must not use any handle; the core checks.
 *
 * OWNERSHIP
 *   Inputs are borrowed for the call, with one exception: the ranges of an accepted submit stay valid and unchanged
 *   until poll has returned its completion (or submit itself did), so that a provider need not copy them. Nothing
 *   allocated on one side is freed on the other. Handles have one opener and one closer, and children close before
 *   parents: rmem before link, link and mem before engine. Outputs are written only on KVL_OK (or KVL_DONE), except
 *   kvl_error, written only on failure. Registered memory belongs to the user and outlives its mem_close.
 *
 * COMPLETION
 *   Every accepted submit completes exactly once: either submit returns KVL_DONE and fills `done`, or it returns
 *   KVL_OK and exactly one later poll returns its tag, with the true status. A PUT is complete with KVL_OK only
 *   when the peer, told so by any later message, would read the new bytes; a GET when the caller would. After a
 *   completion with any status, and after link_close returned, the provider touches that submit's local memory no
 *   more. A failed or cancelled PUT may have written any part of its remote ranges, and nothing outside them.
 *
 * VERSIONS
 *   Every struct begins with its size in bytes as its writer knows it. A reader uses no field beyond that size, and
 *   new fields are only appended. A slot marked [optional] may be NULL; its capability bit is then clear.
 *
 * Times are milliseconds and end in _ms; sizes are bytes. Text is UTF-8 and ends in NUL.
 */
#ifndef KVLINK_PROVIDER_H
#define KVLINK_PROVIDER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { KVL_ABI_VERSION = 1 };

/* Status codes, grouped by what must be done again: the call, the link, or the engine. */
enum kvl_status_code {
  KVL_OK = 0,
  KVL_DONE = 1,        /* submit only: accepted and already complete */
  KVL_AGAIN = 2,       /* queue full: poll, then try again */
  KVL_INVALID = 3,     /* a wrong argument; nothing happened */
  KVL_STATE = 4,       /* right call, wrong moment */
  KVL_BUSY = 5,        /* still in use, or too many at once */
  KVL_UNSUPPORTED = 6, /* this provider lacks that capability */
  KVL_UNAVAILABLE = 7, /* this host cannot use this provider */
  KVL_NO_RESOURCE = 8, /* memory, descriptors or device resources ran out */
  KVL_DENIED = 9,      /* access not published, or a proof that does not hold */
  KVL_TIMEOUT = 10,    /* the deadline passed */
  KVL_CANCELLED = 11,  /* stopped on request */
  KVL_INTERNAL = 12,   /* a defect of the provider or the core */
  KVL_REMOTE = 13,     /* the peer refused or failed */
  KVL_LINK_DOWN = 14,  /* this link is gone: open another */
  KVL_ENGINE_DOWN = 15 /* the device or engine is gone: open another engine */
};
typedef int32_t kvl_status;

/* An error in the caller's memory: 512 bytes, nothing to release. The caller sets struct_size. */
typedef struct kvl_error {
  uint32_t struct_size;
  kvl_status status;
  int64_t vendor_code; /* the raw code of the vendor call or errno, else 0 */
  char site[48];       /* the call that failed: "process_vm_readv", "HcclCommPrepare" */
  char message[448];   /* what happened, with values, and one thing to check */
} kvl_error;

enum kvl_memory_kind { KVL_MEMORY_HOST = 0, KVL_MEMORY_DEVICE = 1 };

/* What peers may do with a region. */
enum kvl_access { KVL_ACCESS_READ = 1, KVL_ACCESS_WRITE = 2 };

enum kvl_connect_mode {
  KVL_CONNECT_INITIATOR = 0, /* only the initiator calls link_connect; the acceptor's link serves by itself */
  KVL_CONNECT_BOTH = 1       /* both sides call link_connect at about the same time, with the same deadline */
};

enum kvl_role { KVL_ROLE_INITIATOR = 0, KVL_ROLE_ACCEPTOR = 1 };

enum kvl_operation { KVL_PUT = 0, KVL_GET = 1 };

/* Capabilities: kvl_attr.caps. A claimed one has passed the conformance kit; an unclaimed one answers UNSUPPORTED. */
enum kvl_capability {
  KVL_CAP_PUT = 1,
  KVL_CAP_GET = 2,
  KVL_CAP_ACCEPTOR_SUBMIT = 4, /* the acceptor's side of a link may submit too */
  KVL_CAP_LATE_MEMORY = 8,     /* memory registered after a link is up works on that link */
  KVL_CAP_ALLOCATE = 16,       /* mem_alloc and mem_free */
  KVL_CAP_COPY = 32,           /* mem_copy */
  KVL_CAP_CANCEL = 64,         /* cancel stops a submit before its deadline */
  KVL_CAP_INTERRUPT = 128,     /* link_interrupt */
  KVL_CAP_LINK_CHECK = 256,    /* link_check */
  KVL_CAP_STREAM = 512,        /* submit honours the caller's stream */
  KVL_CAP_STATISTICS = 1024,   /* stats */
  KVL_CAP_BUSY_POLL = 2048     /* link_busy_poll */
};

/* Limits and attributes of an open engine; constant for its life. A limit of 0 means none. */
typedef struct kvl_attr {
  uint32_t struct_size;
  uint32_t connect_mode; /* enum kvl_connect_mode */
  uint32_t max_connects; /* link_connect calls at once on this engine */
  uint32_t max_links;
  uint64_t caps;             /* enum kvl_capability, or-ed */
  uint64_t memory_kinds;     /* 1 << enum kvl_memory_kind, or-ed */
  uint64_t alignment;        /* offsets and lengths of ranges: a multiple of this (1 = any) */
  uint64_t memory_alignment; /* address and length at mem_open: a multiple of this (1 = any) */
  uint64_t max_ranges;       /* ranges in one submit; the core splits longer batches */
  uint64_t max_range_bytes;  /* bytes in one range; the core splits longer ranges */
  uint64_t max_describe;     /* no link_describe blob is longer (bytes) */
  uint64_t max_export;       /* no mem_export blob is longer (bytes) */
  char exclusion_group[32];  /* one provider of a non-empty group at a time in a process */
} kvl_attr;

typedef struct kvl_option {
  const char *name;
  const char *value;
} kvl_option;

typedef struct kvl_engine_params {
  uint32_t struct_size;
  uint32_t option_count;
  const kvl_option *options; /* an unknown name or a bad value is INVALID, naming the nearest valid one */
  const char *device;        /* "cpu", "npu:0" */
} kvl_engine_params;

typedef struct kvl_mem_desc {
  uint32_t struct_size;
  uint32_t kind;   /* enum kvl_memory_kind */
  int32_t device;  /* device index; -1 for host memory */
  uint32_t access; /* enum kvl_access, or-ed: what peers may do */
  uint64_t address;
  uint64_t length;
} kvl_mem_desc;

/* One piece of work: local memory [local_offset, +length) with the peer's [remote_offset, +length).
 *
 * mem and rmem are handles that the core assigned: the low KVL_HANDLE_INDEX_BITS are a dense table index, the rest a
 * generation. The core has checked both handles, the bounds and the overflow before a provider sees a range. */
typedef struct kvl_range {
  uint32_t mem;
  uint32_t rmem;
  uint64_t local_offset;
  uint64_t remote_offset;
  uint64_t length;
} kvl_range;

enum { KVL_HANDLE_INDEX_BITS = 20 };

typedef struct kvl_completion {
  uint64_t tag;
  kvl_status status;
  uint32_t path; /* provider's own small number of the way taken; see kvl_provider.path_names */
  int64_t vendor_code;
  uint64_t bytes; /* moved; all of them when status is KVL_OK */
  char site[48];  /* on failure as in kvl_error */
  char message[200];
} kvl_completion;

typedef struct kvl_link_params {
  uint32_t struct_size;
  uint32_t role;           /* enum kvl_role */
  uint64_t epoch;          /* grows with every link of a channel */
  uint8_t session[16];     /* the same on both sides, fresh for every attempt */
  uint8_t session_key[32]; /* the same on both sides, secret: data connections prove that they know it */
  char local_id[64];
  char peer_id[64];
} kvl_link_params;

typedef struct kvl_stat {
  char name[32];
  uint64_t value;
} kvl_stat;

typedef struct kvl_engine kvl_engine; /* the provider's own types behind these names */
typedef struct kvl_link kvl_link;

typedef struct kvl_provider {
  uint32_t struct_size; /* in: room for the table, in bytes; out: bytes filled */
  uint32_t abi_version;
  uint32_t wire_version; /* of the provider's own blobs and data protocol; peers must agree */
  uint32_t path_count;
  const char *name; /* the value of transfer_channel */
  const char *version;
  const char *const *path_names; /* path_count names; kvl_completion.path indexes them */

  /* Can this host use this provider? Loads vendor libraries; the reason in err if not. Called in a child process. */
  kvl_status (*probe)(kvl_error *err);

  kvl_status (*engine_open)(const kvl_engine_params *params, kvl_engine **engine, kvl_error *err);
  /* All links are closed by now, and all memory but what mem_close called BUSY to the last: that is let go of when the
   * vendor does, and not before. Joins the provider's threads, frees everything else. */
  void (*engine_close)(kvl_engine *engine);
  kvl_status (*engine_query)(kvl_engine *engine, kvl_attr *attr, kvl_error *err);

  /* [optional: CAP_ALLOCATE] Memory this provider moves fastest, zeroed, at least `length` bytes, page-aligned. */
  kvl_status (*mem_alloc)(kvl_engine *engine, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err);
  void (*mem_free)(kvl_engine *engine, uint64_t address);

  /* Register memory under the core's handle. The same handle is never open twice at once. */
  kvl_status (*mem_open)(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err);
  /* Forget it. BUSY while bound to a live link, where the transport cannot let go earlier; the core then closes
   * the links and calls again. Once this returned OK, this side serves no access to that memory any more. */
  kvl_status (*mem_close)(kvl_engine *engine, uint32_t mem, kvl_error *err);
  /* The bytes a peer needs to address it. Two calls: with buffer NULL or *length too small, *length is set to the
   * bytes needed and NO_RESOURCE returned. */
  kvl_status (*mem_export)(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err);
  /* [optional: CAP_COPY] Synchronous copy between host memory and registered memory the CPU cannot touch. */
  kvl_status (*mem_copy)(kvl_engine *engine, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                         int32_t to_region, kvl_error *err);

  /* Allocate only, no I/O with the peer. */
  kvl_status (*link_open)(kvl_engine *engine, const kvl_link_params *params, kvl_link **link, kvl_error *err);
  /* What the peer's link_connect (and, in INITIATOR mode, the accepting side) needs; two-call idiom. An initiator's
   * describe comes before its peer blob is known. */
  kvl_status (*link_describe)(kvl_link *link, void *buffer, uint64_t *length, kvl_error *err);
  /* Connect to the peer described by `blob`. In INITIATOR mode, when it returns OK the acceptor's side serves. On
   * failure the link may only be closed. */
  kvl_status (*link_connect)(kvl_link *link, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err);
  /* Stop everything on this link; works with a dead or stopped peer, within about grace_ms. When it returns, every
   * accepted submit of this link has its completion waiting in poll and the link touches local memory no more. The
   * handle stays valid for nothing but those completions: tags, not handles, travel in them. Imported regions that a
   * submit still used were not closed before; they end with the link. */
  void (*link_close)(kvl_link *link, uint32_t grace_ms);

  /* Import a peer's region under the core's handle; valid for this link only. May block up to timeout_ms. */
  kvl_status (*rmem_open)(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                          kvl_error *err);
  /* The core has no submit in flight on it. After this the provider issues no access to that region. */
  void (*rmem_close)(kvl_link *link, uint32_t rmem);

  /* Move `count` ranges (all PUT or all GET): all accepted or none. `stream` is the caller's device stream or 0. */
  kvl_status (*submit)(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                       uint64_t tag, kvl_completion *done, kvl_error *err);
  /* Drive progress with bounded work (a few hundred microseconds at most) and return finished tags. *count: in the
   * room of `completions`, out the number filled. *more is set to 1 when work is left that needs no event, so that
   * the caller should poll again instead of wait. Only KVL_OK and KVL_ENGINE_DOWN. */
  kvl_status (*poll)(kvl_engine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more, kvl_error *err);
  /* Sleep until poll has work, wake is called (also just before), or timeout_ms passed. No CPU is used meanwhile. */
  void (*wait)(kvl_engine *engine, uint32_t timeout_ms);
  void (*wake)(kvl_engine *engine);

  /* [optional: CAP_CANCEL] Ask; the tag still completes once with its true status. Unknown tags are ignored. */
  void (*cancel)(kvl_link *link, uint64_t tag);
  /* [optional: CAP_INTERRUPT] Make a blocked link_connect return CANCELLED soon. */
  void (*link_interrupt)(kvl_link *link);
  /* [optional: CAP_LINK_CHECK] OK while the data path lives, else LINK_DOWN with the reason. Never blocks. */
  kvl_status (*link_check)(kvl_link *link, kvl_error *err);
  /* [optional: CAP_STATISTICS] Named counters. *count: in room, out filled. */
  kvl_status (*stats)(kvl_engine *engine, kvl_stat *out, uint32_t *count, kvl_error *err);
  /* [optional: CAP_BUSY_POLL] A thread that waits for a submit of this link lends itself: it watches the link's
   * connection until a completion is ready for poll, somebody else needs the engine, or budget_us microseconds passed.
   * Meanwhile the link's events need not end wait, so that no second thread is woken for them; afterwards they do. One
   * thread a link at a time: others return at once. */
  void (*link_busy_poll)(kvl_link *link, uint32_t budget_us);
} kvl_provider;

/* The one exported symbol. Fills `provider` for exactly `abi_version` or returns UNSUPPORTED; the core then tries a
 * lower version. provider->struct_size comes in as room. */
typedef kvl_status (*kvl_provider_init_fn)(uint32_t abi_version, kvl_provider *provider, kvl_error *err);
kvl_status kvl_provider_init(uint32_t abi_version, kvl_provider *provider, kvl_error *err);

#ifdef __cplusplus
}
#endif

#endif /* KVLINK_PROVIDER_H */
