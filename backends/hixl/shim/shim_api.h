/* What libkvlink_hixl_shim.so offers libkvlink_hixl.so: the vendor's class behind plain C.
 *
 * Two libraries, because the provider's own must load on any machine: it has no vendor symbol. The shim's vendor
 * symbols are undefined and bound by no DT_NEEDED; the provider loads the vendor's libraries first, into the global
 * scope, and the shim after them. The two are built with different string ABIs: nothing but C crosses here.
 *
 * A status is the vendor's own, or KVLINK_HIXL_EXCEPTION when the vendor's code threw. */
#ifndef KVLINK_HIXL_SHIM_API_H
#define KVLINK_HIXL_SHIM_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { KVLINK_HIXL_SHIM_VERSION = 1 };
#define KVLINK_HIXL_EXCEPTION UINT32_C(0xFFFFFFFE)

typedef struct kvlink_hixl kvlink_hixl;               /* one hixl::Hixl */
typedef struct kvlink_hixl_remote kvlink_hixl_remote; /* the name of a remote engine and a batch to fill for it */

typedef struct kvlink_hixl_option {
  const char *name;
  const char *value;
} kvlink_hixl_option;

typedef struct kvlink_hixl_desc { /* laid out as hixl::TransferOpDesc */
  uint64_t local;
  uint64_t remote;
  uint64_t length;
} kvlink_hixl_desc;

typedef struct kvlink_hixl_shim {
  uint32_t struct_size;
  uint32_t version; /* KVLINK_HIXL_SHIM_VERSION */

  kvlink_hixl *(*create)(void); /* NULL: out of memory, or the vendor threw */
  uint32_t (*initialize)(kvlink_hixl *hixl, const char *local_engine, const kvlink_hixl_option *options,
                         uint32_t option_count);
  void (*finalize)(kvlink_hixl *hixl);
  void (*destroy)(kvlink_hixl *hixl);
  uint32_t (*register_memory)(kvlink_hixl *hixl, uint64_t address, uint64_t length, int32_t is_device, void **handle);
  uint32_t (*deregister_memory)(kvlink_hixl *hixl, void *handle);

  kvlink_hixl_remote *(*remote_create)(const char *engine);
  void (*remote_destroy)(kvlink_hixl_remote *remote);
  uint32_t (*connect)(kvlink_hixl *hixl, const kvlink_hixl_remote *remote, int32_t timeout_ms);
  uint32_t (*disconnect)(kvlink_hixl *hixl, const kvlink_hixl_remote *remote, int32_t timeout_ms);

  /* Room for `count` descriptors of the next transfer; NULL: out of memory. Reused: allocates only to grow. */
  kvlink_hixl_desc *(*batch)(kvlink_hixl_remote *remote, uint32_t count);
  /* Starts the transfer of the batch; is_put moves local to remote. */
  uint32_t (*transfer)(kvlink_hixl *hixl, kvlink_hixl_remote *remote, int32_t is_put, void **request);
  /* *state as hixl::TransferStatus; it stays what it was where the vendor leaves it alone. */
  uint32_t (*transfer_status)(kvlink_hixl *hixl, void *request, uint32_t *state);
} kvlink_hixl_shim;

/* The one exported symbol. */
typedef const kvlink_hixl_shim *(*kvlink_hixl_shim_fn)(void);
const kvlink_hixl_shim *kvlink_hixl_shim_table(void);

#ifdef __cplusplus
}
#endif

#endif /* KVLINK_HIXL_SHIM_API_H */
