// hccl_count LIBRARY COUNT: one put of COUNT ranges over a link between two devices of this process.
//
// The functions named measured_* are what callgrind is told to count. Prints how often the provider allocated memory in
// submit, and in all until the completion. Any failure ends it with a message and exit code 1.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kvlink/provider.h"

extern "C" void *__libc_malloc(size_t size);

namespace {

std::atomic<uint64_t> allocations{0};
std::atomic<uintptr_t> provider_begin{0}, provider_end{0};  // where its code is

int find_provider(dl_phdr_info *info, size_t, void *wanted) {
  const auto address = reinterpret_cast<uintptr_t>(wanted);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) &segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type != PT_LOAD || address < begin || address >= begin + segment.p_memsz) continue;
    provider_begin.store(begin);
    provider_end.store(begin + segment.p_memsz);
    return 1;
  }
  return 0;
}

}  // namespace

// Takes the place of libc's for this process, the provider included.
extern "C" __attribute__((visibility("default"))) void *malloc(size_t size) {
  const auto caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  if (caller >= provider_begin.load() && caller < provider_end.load()) allocations.fetch_add(1);
  return __libc_malloc(size);
}

extern "C" __attribute__((noinline)) kvl_status measured_submit(const kvl_provider *table, kvl_link *link,
                                                                const kvl_range *ranges, uint64_t count,
                                                                kvl_completion *done, kvl_error *error) {
  return table->submit(link, KVL_PUT, ranges, count, 0, 1, done, error);
}

extern "C" __attribute__((noinline)) kvl_status measured_poll(const kvl_provider *table, kvl_engine *engine,
                                                              kvl_completion *out, uint32_t *count, uint32_t *more,
                                                              kvl_error *error) {
  return table->poll(engine, out, count, more, error);
}

namespace {

constexpr uint64_t kPiece = 4096;
constexpr uint64_t kStride = 3 * kPiece;
constexpr uint32_t kHandle = 1;

struct Error {
  Error() { value.struct_size = sizeof value; }
  kvl_error value{};
};

void must(kvl_status status, const char *what, const Error &error) {
  if (status == KVL_OK) return;
  std::fprintf(stderr, "%s: %s\n", what, error.value.message);
  std::exit(1);
}

// One side: an engine on its own device with a region and a link.
struct Side {
  kvl_engine *engine = nullptr;
  kvl_link *link = nullptr;
  std::vector<char> link_blob, region_blob;
};

template <typename Describe>
std::vector<char> blob_of(Describe describe) {
  uint64_t length = 0;
  describe(nullptr, &length);
  std::vector<char> blob(length);
  describe(blob.data(), &length);
  return blob;
}

Side open_side(const kvl_provider &table, const char *device, uint32_t role, uint64_t bytes) {
  Side side;
  Error error;
  kvl_engine_params params{};
  params.struct_size = sizeof params;
  params.device = device;
  must(table.engine_open(&params, &side.engine, &error.value), "engine_open", error);
  uint64_t address = 0;
  must(table.mem_alloc(side.engine, KVL_MEMORY_DEVICE, bytes, &address, &error.value), "mem_alloc", error);
  kvl_mem_desc desc{};
  desc.struct_size = sizeof desc;
  desc.kind = KVL_MEMORY_DEVICE;
  desc.device = device[4] - '0';
  desc.access = KVL_ACCESS_READ | KVL_ACCESS_WRITE;
  desc.address = address;
  desc.length = bytes;
  must(table.mem_open(side.engine, kHandle, &desc, &error.value), "mem_open", error);
  kvl_link_params link{};
  link.struct_size = sizeof link;
  link.role = role;
  link.epoch = 1;
  std::strcpy(link.local_id, "here");
  std::strcpy(link.peer_id, "there");
  must(table.link_open(side.engine, &link, &side.link, &error.value), "link_open", error);
  side.link_blob = blob_of(
      [&](void *buffer, uint64_t *length) { return table.link_describe(side.link, buffer, length, &error.value); });
  side.region_blob = blob_of([&](void *buffer, uint64_t *length) {
    return table.mem_export(side.engine, kHandle, buffer, length, &error.value);
  });
  return side;
}

void connect(const kvl_provider &table, const Side &side, const Side &peer) {
  Error error;
  must(table.link_connect(side.link, peer.link_blob.data(), peer.link_blob.size(), 60000, &error.value), "link_connect",
       error);
  must(table.rmem_open(side.link, kHandle, peer.region_blob.data(), peer.region_blob.size(), 1000, &error.value),
       "rmem_open", error);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: hccl_count LIBRARY COUNT\n");
    return 2;
  }
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  const auto init =
      library == nullptr ? nullptr : reinterpret_cast<kvl_provider_init_fn>(dlsym(library, "kvl_provider_init"));
  if (init == nullptr) {
    std::fprintf(stderr, "%s is no provider: %s\n", argv[1], dlerror());
    return 1;
  }
  dl_iterate_phdr(find_provider, reinterpret_cast<void *>(init));
  const uint64_t count = std::strtoull(argv[2], nullptr, 10);
  kvl_provider table{};
  table.struct_size = sizeof table;
  Error error;
  must(init(KVL_ABI_VERSION, &table, &error.value), "kvl_provider_init", error);
  const Side one = open_side(table, "npu:0", KVL_ROLE_INITIATOR, count * kStride);
  const Side two = open_side(table, "npu:1", KVL_ROLE_ACCEPTOR, count * kStride);
  std::thread other([&] { connect(table, two, one); });
  connect(table, one, two);
  other.join();
  std::vector<kvl_range> ranges;
  for (uint64_t i = 0; i < count; ++i) ranges.push_back({kHandle, kHandle, i * kStride, i * kStride, kPiece});

  kvl_completion done{};
  const uint64_t at_first = allocations.load();
  must(measured_submit(&table, one.link, ranges.data(), count, &done, &error.value), "submit", error);
  const uint64_t after_submit = allocations.load();
  for (uint32_t got = 0; got == 0;) {
    got = 1;
    uint32_t more = 0;
    must(measured_poll(&table, one.engine, &done, &got, &more, &error.value), "poll", error);
    if (got == 0 && more == 0) table.wait(one.engine, 1);
  }
  if (done.status != KVL_OK || done.bytes != count * kPiece) {
    std::fprintf(stderr, "the put ended with status %d, %llu bytes: %s\n", done.status,
                 static_cast<unsigned long long>(done.bytes), done.message);
    return 1;
  }
  std::printf("%llu %llu\n", static_cast<unsigned long long>(after_submit - at_first),
              static_cast<unsigned long long>(allocations.load() - at_first));
  table.link_close(one.link, 1000);
  table.link_close(two.link, 1000);
  return 0;
}
