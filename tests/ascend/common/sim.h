// The simulator's libraries for one test process: set the environment up before the first vendor call, look inside.
#ifndef KVLINK_TESTS_ASCEND_SIM_H
#define KVLINK_TESTS_ASCEND_SIM_H

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "native/host/harness.h"

namespace kvlink::test {

// `libs` is the build's folder of flavours. The loader read LD_LIBRARY_PATH before main, so the libraries are loaded by
// their path here; a later dlopen by name finds them loaded. The simulator's settings are read at its first call.
inline void use_simulator(const std::string &libs, const std::string &flavour,
                          const std::vector<std::pair<std::string, std::string>> &settings = {}) {
  setenv("CANN_SIM_DEVICES", "2", 1);
  setenv("CANN_SIM_DELAY_US", "100:300", 1);
  for (const auto &item : settings) setenv(item.first.c_str(), item.second.c_str(), 1);
  for (const char *name : {"libascendcl.so", "libruntime.so"}) {
    const std::string path = libs + "/" + flavour + "/" + name;
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_NODELETE) == nullptr) {
      std::fprintf(stderr, "%s: %s\n", path.c_str(), dlerror());
      std::exit(1);
    }
  }
}

// A function of the vendor's that kvlink itself does not use, or one of the simulator's own.
template <typename Function>
Function simulator(const char *name) {
  for (const char *library : {"libcann_sim.so", "libascendcl.so"}) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    CHECK(handle != nullptr);
    void *function = dlsym(handle, name);
    if (function != nullptr) return reinterpret_cast<Function>(function);
  }
  std::fprintf(stderr, "the simulator has no %s\n", name);
  std::exit(1);
}

inline void set_faults(const char *spec) { simulator<void (*)(const char *)>("cann_sim_set_faults")(spec); }
inline void release_hangs() { simulator<void (*)()>("cann_sim_release")(); }
inline int64_t live(const char *name) { return simulator<int64_t (*)(const char *)>("cann_sim_live")(name); }

}  // namespace kvlink::test

#endif  // KVLINK_TESTS_ASCEND_SIM_H
