// without_cann_test LIBRARY NAME: an Ascend provider on a machine without CANN loads, describes itself, and says in its
// probe and at open why it cannot be used and what to do.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kvlink/provider.h"

namespace {

void check(bool condition, const char *what, const char *detail = "") {
  if (condition) return;
  std::fprintf(stderr, "failed: %s %s\n", what, detail);
  std::exit(1);
}

kvl_error make_error() {
  kvl_error error{};
  error.struct_size = sizeof error;
  return error;
}

void check_reason(const char *where, kvl_status status, const kvl_error &error) {
  std::printf("%s: %d %s: %s\n", where, status, error.site, error.message);
  check(status == KVL_UNAVAILABLE, where, "did not answer UNAVAILABLE");
  check(error.status == KVL_UNAVAILABLE, where, "left another status in the error");
  check(std::strstr(error.message, "CANN") != nullptr || std::strstr(error.message, "libascendcl.so") != nullptr, where,
        "names neither CANN nor the library");
  check(std::strstr(error.message, "ASCEND_HOME_PATH") != nullptr, where, "does not say what to do");
}

}  // namespace

int main(int argc, char **argv) {
  check(argc == 3, "usage: without_cann_test LIBRARY NAME");
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  check(library != nullptr, "dlopen:", library == nullptr ? dlerror() : "");
  void *symbol = dlsym(library, "kvl_provider_init");
  check(symbol != nullptr, "kvl_provider_init is not exported");
  const auto init = reinterpret_cast<kvl_provider_init_fn>(symbol);

  kvl_provider provider{};
  provider.struct_size = sizeof provider;
  kvl_error error = make_error();
  check(init(KVL_ABI_VERSION + 1, &provider, &error) == KVL_UNSUPPORTED, "an unknown ABI version was accepted");
  provider = {};
  provider.struct_size = sizeof provider;
  check(init(KVL_ABI_VERSION, &provider, &error) == KVL_OK, "init:", error.message);
  check(std::strcmp(provider.name, argv[2]) == 0, "the provider calls itself", provider.name);

  error = make_error();
  check_reason("probe", provider.probe(&error), error);
  error = make_error();
  kvl_engine_params params{};
  params.struct_size = sizeof params;
  params.device = "npu:0";
  kvl_engine *engine = nullptr;
  check_reason("engine_open", provider.engine_open(&params, &engine, &error), error);
  check(engine == nullptr, "engine_open failed and gave an engine");
  return 0;
}
