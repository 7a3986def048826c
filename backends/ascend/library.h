// Loading vendor libraries: which one, from where, which symbol is missing, and what a person can do about it.
//
// A library that was opened stays for the life of the process (RTLD_NODELETE, no dlclose): the vendor's libraries own
// threads, singletons and thread-local objects that do not survive being unloaded.
#ifndef KVLINK_ASCEND_LIBRARY_H
#define KVLINK_ASCEND_LIBRARY_H

#include <string>
#include <vector>

#include "host/failure.h"

namespace kvlink::ascend {

using host::errno_failure;
using host::Failure;
using host::make_failure;
using host::report;

class Library {
 public:
  enum class Scope { kLocal, kGlobal };  // kGlobal: its symbols serve libraries that are opened later

  // By its name first, as torch_npu finds it (LD_LIBRARY_PATH), then in the toolkit's lib64. UNAVAILABLE with the
  // reason and one thing to do: no toolkit, environment not set up, driver not mounted, stub library in use.
  static Failure open(const char *soname, Scope scope, Library *out);
  // The same for a file, such as a shim beside the provider's own library.
  static Failure open_path(const std::string &path, Scope scope, Library *out);

  explicit operator bool() const { return handle_ != nullptr; }
  void *find(const char *symbol) const;  // null when it has none
  const std::string &name() const { return name_; }
  const std::string &path() const { return path_; }  // the file that was loaded
  bool is_stub() const;                              // from the toolkit's devlib: links, but does nothing

 private:
  void *handle_ = nullptr;
  std::string name_, path_;
};

// The failure for symbols that `library` lacks, naming them, the file, and the CANN version that has them.
Failure missing_symbols(const Library &library, const std::vector<std::string> &names, const char *since);

// The directory of the library that this code is in: a shim lies beside its provider.
std::string own_directory();

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_LIBRARY_H
