/* A provider for the unit tests of the binding: both ends of a link live in one process, so bytes move by memcpy.
 *
 * Option "mode": "done" ends a submit inside submit, "queue" ends it in the next poll, "hang" keeps it until it is
 * cancelled or its link is closed, "fail" ends it with an error of its own. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvlink/provider.h"

enum { TABLE = 1024, QUEUE = 4096 };
enum mode { DONE, QUEUED, HANG, FAIL };

typedef struct pending {
  kvl_link *link;
  kvl_completion completion;
  int ready;
} pending;

struct kvl_engine {
  pthread_mutex_t mutex;
  pthread_cond_t wakeup;
  int woken;
  enum mode mode;
  kvl_mem_desc mem[TABLE];
  pending queue[QUEUE];
  uint32_t queued;
  uint64_t submits;
};

struct kvl_link {
  kvl_engine *engine;
  kvl_link_params params;
  uint64_t address[TABLE];
};

static kvl_status fail(kvl_error *err, kvl_status status, const char *site, int64_t code, const char *message) {
  err->status = status;
  err->vendor_code = code;
  strncpy(err->site, site, sizeof err->site - 1);
  strncpy(err->message, message, sizeof err->message - 1);
  return status;
}

static uint32_t slot(uint32_t handle) { return handle & ((1u << KVL_HANDLE_INDEX_BITS) - 1) & (TABLE - 1); }

static kvl_status copy_blob(const void *blob, uint64_t size, void *buffer, uint64_t *length, kvl_error *err) {
  if (buffer == NULL || *length < size) {
    *length = size;
    return fail(err, KVL_NO_RESOURCE, "", 0, "the buffer is too small");
  }
  memcpy(buffer, blob, size);
  *length = size;
  return KVL_OK;
}

static kvl_status probe(kvl_error *err) {
  const char *reason = getenv("LOOP_PROVIDER_REASON");
  return reason == NULL ? KVL_OK : fail(err, KVL_UNAVAILABLE, "getenv", 5, reason);
}

static kvl_status engine_open(const kvl_engine_params *params, kvl_engine **out, kvl_error *err) {
  static const char *const modes[] = {"done", "queue", "hang", "fail"};
  kvl_engine *engine = calloc(1, sizeof *engine);
  if (engine == NULL) return fail(err, KVL_NO_RESOURCE, "calloc", 12, "out of memory");
  for (uint32_t i = 0; i < params->option_count; ++i) {
    int known = -1;
    for (int mode = 0; mode < 4 && strcmp(params->options[i].name, "mode") == 0; ++mode) {
      if (strcmp(params->options[i].value, modes[mode]) == 0) known = mode;
    }
    if (known < 0) {
      free(engine);
      return fail(err, KVL_INVALID, "", 0, "unknown option or mode; known: mode=done|queue|hang|fail");
    }
    engine->mode = (enum mode)known;
  }
  pthread_mutex_init(&engine->mutex, NULL);
  pthread_cond_init(&engine->wakeup, NULL);
  *out = engine;
  return KVL_OK;
}

static void engine_close(kvl_engine *engine) {
  pthread_cond_destroy(&engine->wakeup);
  pthread_mutex_destroy(&engine->mutex);
  free(engine);
}

static kvl_status engine_query(kvl_engine *engine, kvl_attr *attr, kvl_error *err) {
  (void)engine, (void)err;
  attr->connect_mode = KVL_CONNECT_INITIATOR;
  attr->caps = KVL_CAP_PUT | KVL_CAP_GET | KVL_CAP_ACCEPTOR_SUBMIT | KVL_CAP_LATE_MEMORY | KVL_CAP_ALLOCATE |
               KVL_CAP_COPY | KVL_CAP_CANCEL | KVL_CAP_STATISTICS;
  attr->memory_kinds = 1u << KVL_MEMORY_HOST;
  attr->alignment = attr->memory_alignment = 1;
  attr->max_links = 3;
  attr->max_describe = attr->max_export = 4096;
  strcpy(attr->exclusion_group, "");
  return KVL_OK;
}

static kvl_status mem_alloc(kvl_engine *engine, uint32_t kind, uint64_t length, uint64_t *address, kvl_error *err) {
  (void)engine, (void)kind;
  void *memory = NULL;
  const uint64_t rounded = (length + 4095) & ~(uint64_t)4095;
  if (length > (uint64_t)1 << 40 || posix_memalign(&memory, 4096, rounded) != 0) {
    return fail(err, KVL_NO_RESOURCE, "posix_memalign", 12, "out of memory");
  }
  memset(memory, 0, rounded);
  *address = (uint64_t)(uintptr_t)memory;
  return KVL_OK;
}

static void mem_free(kvl_engine *engine, uint64_t address) {
  (void)engine;
  free((void *)(uintptr_t)address);
}

static kvl_status mem_open(kvl_engine *engine, uint32_t mem, const kvl_mem_desc *desc, kvl_error *err) {
  (void)err;
  engine->mem[slot(mem)] = *desc;
  return KVL_OK;
}

static kvl_status mem_close(kvl_engine *engine, uint32_t mem, kvl_error *err) {
  (void)err;
  memset(&engine->mem[slot(mem)], 0, sizeof(kvl_mem_desc));
  return KVL_OK;
}

static kvl_status mem_export(kvl_engine *engine, uint32_t mem, void *buffer, uint64_t *length, kvl_error *err) {
  /* Longer than the binding's first buffer, so that its second call is tested. */
  char blob[1000] = {0};
  memcpy(blob, &engine->mem[slot(mem)].address, 8);
  return copy_blob(blob, sizeof blob, buffer, length, err);
}

static kvl_status mem_copy(kvl_engine *engine, uint32_t mem, uint64_t offset, void *host, uint64_t length,
                           int32_t to_region, kvl_error *err) {
  (void)err;
  char *region = (char *)(uintptr_t)engine->mem[slot(mem)].address + offset;
  memcpy(to_region ? region : host, to_region ? host : region, length);
  return KVL_OK;
}

static kvl_status link_open(kvl_engine *engine, const kvl_link_params *params, kvl_link **out, kvl_error *err) {
  kvl_link *link = calloc(1, sizeof *link);
  if (link == NULL) return fail(err, KVL_NO_RESOURCE, "calloc", 12, "out of memory");
  link->engine = engine;
  link->params = *params;
  *out = link;
  return KVL_OK;
}

static kvl_status link_describe(kvl_link *link, void *buffer, uint64_t *length, kvl_error *err) {
  return copy_blob(&link->params, sizeof link->params, buffer, length, err);
}

static kvl_status link_connect(kvl_link *link, const void *blob, uint64_t length, uint32_t timeout_ms, kvl_error *err) {
  (void)timeout_ms;
  const kvl_link_params *peer = blob;
  if (length != sizeof *peer) return fail(err, KVL_REMOTE, "connect", 111, "the blob is not a loop's");
  if (memcmp(peer->session_key, link->params.session_key, sizeof peer->session_key) != 0) {
    return fail(err, KVL_DENIED, "", 0, "the keys differ");
  }
  return KVL_OK;
}

static void end_locked(kvl_engine *engine, kvl_link *link, uint64_t tag, kvl_status status) {
  for (uint32_t i = 0; i < engine->queued; ++i) {
    pending *entry = &engine->queue[i];
    if (entry->link != link || entry->ready || (tag != 0 && entry->completion.tag != tag)) continue;
    entry->completion.status = status;
    entry->completion.bytes = 0;
    entry->ready = 1;
  }
  engine->woken = 1;
  pthread_cond_broadcast(&engine->wakeup);
}

static void link_close(kvl_link *link, uint32_t grace_ms) {
  (void)grace_ms;
  pthread_mutex_lock(&link->engine->mutex);
  end_locked(link->engine, link, 0, KVL_LINK_DOWN);
  pthread_mutex_unlock(&link->engine->mutex);
}

static kvl_status rmem_open(kvl_link *link, uint32_t rmem, const void *blob, uint64_t length, uint32_t timeout_ms,
                            kvl_error *err) {
  (void)timeout_ms;
  if (length != 1000) return fail(err, KVL_REMOTE, "", 0, "the region's blob is not a loop's");
  memcpy(&link->address[slot(rmem)], blob, 8);
  return KVL_OK;
}

static void rmem_close(kvl_link *link, uint32_t rmem) { link->address[slot(rmem)] = 0; }

static kvl_status submit(kvl_link *link, uint32_t operation, const kvl_range *ranges, uint64_t count, uint64_t stream,
                         uint64_t tag, kvl_completion *done, kvl_error *err) {
  (void)stream;
  kvl_engine *engine = link->engine;
  kvl_completion completion = {.tag = tag, .status = KVL_OK, .path = 1};
  if (engine->mode == FAIL) {
    completion.status = KVL_REMOTE;
    completion.vendor_code = -77;
    strcpy(completion.site, "loop_copy");
    strcpy(completion.message, "told to fail");
  }
  for (uint64_t i = 0; i < count && engine->mode <= QUEUED; ++i) {
    char *local = (char *)(uintptr_t)engine->mem[slot(ranges[i].mem)].address + ranges[i].local_offset;
    char *remote = (char *)(uintptr_t)link->address[slot(ranges[i].rmem)] + ranges[i].remote_offset;
    memcpy(operation == KVL_PUT ? remote : local, operation == KVL_PUT ? local : remote, ranges[i].length);
    completion.bytes += ranges[i].length;
  }
  pthread_mutex_lock(&engine->mutex);
  ++engine->submits;
  if (engine->mode == DONE) {
    pthread_mutex_unlock(&engine->mutex);
    *done = completion;
    return KVL_DONE;
  }
  if (engine->queued == QUEUE) {
    pthread_mutex_unlock(&engine->mutex);
    return fail(err, KVL_AGAIN, "", 0, "the queue is full");
  }
  engine->queue[engine->queued++] = (pending){link, completion, engine->mode != HANG};
  engine->woken = 1;
  pthread_cond_broadcast(&engine->wakeup);
  pthread_mutex_unlock(&engine->mutex);
  return KVL_OK;
}

static kvl_status poll_engine(kvl_engine *engine, kvl_completion *completions, uint32_t *count, uint32_t *more,
                              kvl_error *err) {
  (void)err;
  uint32_t filled = 0, kept = 0;
  *more = 0;
  pthread_mutex_lock(&engine->mutex);
  for (uint32_t i = 0; i < engine->queued; ++i) {
    if (engine->queue[i].ready && filled < *count) {
      completions[filled++] = engine->queue[i].completion;
    } else {
      if (engine->queue[i].ready) *more = 1;
      engine->queue[kept++] = engine->queue[i];
    }
  }
  engine->queued = kept;
  pthread_mutex_unlock(&engine->mutex);
  *count = filled;
  return KVL_OK;
}

static void wait_engine(kvl_engine *engine, uint32_t timeout_ms) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += timeout_ms / 1000;
  until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
  if (until.tv_nsec >= 1000000000) {
    until.tv_nsec -= 1000000000;
    ++until.tv_sec;
  }
  pthread_mutex_lock(&engine->mutex);
  while (!engine->woken && pthread_cond_timedwait(&engine->wakeup, &engine->mutex, &until) == 0) {
  }
  engine->woken = 0;
  pthread_mutex_unlock(&engine->mutex);
}

static void wake(kvl_engine *engine) {
  pthread_mutex_lock(&engine->mutex);
  engine->woken = 1;
  pthread_cond_broadcast(&engine->wakeup);
  pthread_mutex_unlock(&engine->mutex);
}

static void cancel(kvl_link *link, uint64_t tag) {
  pthread_mutex_lock(&link->engine->mutex);
  end_locked(link->engine, link, tag, KVL_CANCELLED);
  pthread_mutex_unlock(&link->engine->mutex);
}

static kvl_status stats(kvl_engine *engine, kvl_stat *out, uint32_t *count, kvl_error *err) {
  (void)err;
  if (*count < 1) return fail(err, KVL_NO_RESOURCE, "", 0, "no room");
  strcpy(out[0].name, "submits");
  pthread_mutex_lock(&engine->mutex);
  out[0].value = engine->submits;
  pthread_mutex_unlock(&engine->mutex);
  *count = 1;
  return KVL_OK;
}

kvl_status kvl_provider_init(uint32_t abi_version, kvl_provider *provider, kvl_error *err) {
  static const char *const paths[] = {"none", "memcpy"};
  if (abi_version != KVL_ABI_VERSION) return fail(err, KVL_UNSUPPORTED, "", 0, "another ABI");
  *provider = (kvl_provider){
      .struct_size = sizeof *provider,
      .abi_version = KVL_ABI_VERSION,
      .wire_version = 3,
      .path_count = 2,
      .name = "loop",
      .version = "1.2.3",
      .path_names = paths,
      .probe = probe,
      .engine_open = engine_open,
      .engine_close = engine_close,
      .engine_query = engine_query,
      .mem_alloc = mem_alloc,
      .mem_free = mem_free,
      .mem_open = mem_open,
      .mem_close = mem_close,
      .mem_export = mem_export,
      .mem_copy = mem_copy,
      .link_open = link_open,
      .link_describe = link_describe,
      .link_connect = link_connect,
      .link_close = link_close,
      .rmem_open = rmem_open,
      .rmem_close = rmem_close,
      .submit = submit,
      .poll = poll_engine,
      .wait = wait_engine,
      .wake = wake,
      .cancel = cancel,
      .stats = stats,
  };
  return KVL_OK;
}
