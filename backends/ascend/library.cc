#include "ascend/library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>

#include "ascend/toolkit.h"

namespace kvlink::ascend {
namespace {

constexpr const char *kStubFolder = "/devlib/";

std::string loader_text() {
  const char *text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

std::string file_of(void *handle) {
  link_map *map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr || map->l_name == nullptr) return {};
  return map->l_name;
}

void *load(const std::string &name, Library::Scope scope) {
  const int flags = RTLD_NOW | RTLD_NODELETE | (scope == Library::Scope::kGlobal ? RTLD_GLOBAL : RTLD_LOCAL);
  return dlopen(name.c_str(), flags);
}

// What a person should do about a library that did not load, by what the loader said.
Failure load_failure(const std::string &soname, const std::string &text) {
  const Toolkit toolkit = find_toolkit();
  std::string advice;
  if (text.find("libascend_hal") != std::string::npos || text.find("libdrv") != std::string::npos ||
      text.find("libdcmi") != std::string::npos) {
    advice = "the NPU driver is not visible: install it or mount /usr/local/Ascend/driver into this container";
  } else if (!toolkit.exists) {
    advice = toolkit.from_variable ? toolkit.source + " is '" + toolkit.root + "', which does not exist: correct it"
                                   : "no CANN toolkit was found: install CANN, or set ASCEND_HOME_PATH to it";
  } else if (!toolkit.set_env.empty()) {
    advice = "run `source " + toolkit.set_env + "` before starting this process";
  } else {
    advice = "the toolkit at " + toolkit.root + " lacks it: install the CANN toolkit package completely";
  }
  return make_failure(KVL_UNAVAILABLE, "dlopen", "%s did not load (%s): %s", soname.c_str(), text.c_str(),
                      advice.c_str());
}

}  // namespace

Failure Library::open(const char *soname, Scope scope, Library *out) {
  Library library;
  library.name_ = soname;
  library.handle_ = load(soname, scope);
  std::string text;
  if (library.handle_ == nullptr) {
    text = loader_text();
    const Toolkit toolkit = find_toolkit();
    if (toolkit.exists) {
      library.handle_ = load(toolkit.root + "/lib64/" + soname, scope);
      if (library.handle_ == nullptr) {
        const std::string second = loader_text();
        // "No such file" in the toolkit says no more than the first reason; anything else is the better one.
        if (second.find("No such file") == std::string::npos) text = second;
      }
    }
  }
  if (library.handle_ == nullptr) return load_failure(soname, text);
  library.path_ = file_of(library.handle_);
  *out = library;
  return {};
}

Failure Library::open_path(const std::string &path, Scope scope, Library *out) {
  Library library;
  const size_t slash = path.rfind('/');
  library.name_ = slash == std::string::npos ? path : path.substr(slash + 1);
  library.handle_ = load(path, scope);
  if (library.handle_ == nullptr) {
    return make_failure(KVL_UNAVAILABLE, "dlopen", "%s did not load: %s", path.c_str(), loader_text().c_str());
  }
  library.path_ = file_of(library.handle_);
  *out = library;
  return {};
}

void *Library::find(const char *symbol) const { return handle_ == nullptr ? nullptr : dlsym(handle_, symbol); }

bool Library::is_stub() const { return path_.find(kStubFolder) != std::string::npos; }

Failure missing_symbols(const Library &library, const std::vector<std::string> &names, const char *since) {
  std::string list;
  const size_t shown = names.size() < 3 ? names.size() : 3;
  for (size_t i = 0; i < shown; ++i) list += (i == 0 ? "" : ", ") + names[i];
  if (shown < names.size()) list += " and " + std::to_string(names.size() - shown) + " more";
  const std::string found = cann_version(find_toolkit(), nullptr).describe();
  if (library.is_stub()) {
    return make_failure(KVL_UNAVAILABLE, "dlsym",
                        "%s is a link-time stub without %s: the NPU driver is not visible; mount "
                        "/usr/local/Ascend/driver and source set_env.sh again",
                        library.path().c_str(), list.c_str());
  }
  return make_failure(KVL_UNAVAILABLE, "dlsym", "%s has no %s, which CANN %s has; the CANN here is %s: upgrade CANN",
                      library.path().c_str(), list.c_str(), since, found.c_str());
}

std::string own_directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void *>(&own_directory), &info) == 0 || info.dli_fname == nullptr) return ".";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

}  // namespace kvlink::ascend
