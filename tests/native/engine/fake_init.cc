// The provider's one entry, in good and in broken variants chosen by definitions (see CMakeLists.txt).
#include "fake.h"

#ifndef FAKE_NAME
#define FAKE_NAME "fake"
#endif
#ifndef FAKE_ABI
#define FAKE_ABI KVL_ABI_VERSION
#endif
#ifndef FAKE_STRUCT_SIZE
#define FAKE_STRUCT_SIZE sizeof(kvl_provider)
#endif
#ifndef FAKE_PATHS
#define FAKE_PATHS 3
#endif
#ifndef FAKE_SYMBOL
#define FAKE_SYMBOL kvl_provider_init
#endif

void fake_fill(kvl_provider *table);

extern "C" __attribute__((visibility("default"))) kvl_status FAKE_SYMBOL(uint32_t abi_version, kvl_provider *table,
                                                                         kvl_error *err) {
#ifdef FAKE_REFUSES
  abi_version = 0;
#endif
  if (abi_version != KVL_ABI_VERSION) {
    err->status = KVL_UNSUPPORTED;
    err->message[0] = 'N';
    err->message[1] = 'o';
    err->message[2] = '!';
    return KVL_UNSUPPORTED;
  }
  static const char *const paths[] = {"direct", "later", "slow"};
  fake_fill(table);
  table->struct_size = static_cast<uint32_t>(FAKE_STRUCT_SIZE);
  table->abi_version = FAKE_ABI;
  table->wire_version = 5;
  table->path_count = FAKE_PATHS;
  table->name = FAKE_NAME;
  table->version = "1.2.3";
  table->path_names = paths;
#ifdef FAKE_NO_POLL
  table->poll = nullptr;
#endif
#ifdef FAKE_MINIMAL
  table->mem_alloc = nullptr;
  table->mem_free = nullptr;
  table->mem_copy = nullptr;
  table->cancel = nullptr;
  table->link_interrupt = nullptr;
  table->link_check = nullptr;
  table->stats = nullptr;
  fake_api().control->caps = FAKE_MINIMAL;
#endif
  return KVL_OK;
}
