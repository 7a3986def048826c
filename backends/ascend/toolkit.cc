#include "ascend/toolkit.h"

#include <sys/stat.h>
#include <sys/utsname.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ascend/acl.h"

namespace kvlink::ascend {
namespace {

// Newest layout first. The second one's set_env.sh lies one level above the toolkit itself.
constexpr const char *kDefaultRoots[] = {"/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest"};
constexpr const char *kDriverInfo = "/usr/local/Ascend/driver/version.info";
constexpr int kFirstPublicMajor = 8;  // files before 8.5 also hold internal numbers (7.x) under the same key
constexpr int kLastTestedMajor = 9;
constexpr int kLastTestedMinor = 1;

bool is_file(const std::string &path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool is_folder(const std::string &path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::string machine() {
  utsname name{};
  return uname(&name) == 0 ? name.machine : "x86_64";
}

std::string find_set_env(const std::string &root) {
  for (const std::string &path : {root + "/set_env.sh", root + "/../set_env.sh"}) {
    if (is_file(path)) return path;
  }
  return {};
}

Version ask_library(const AclApi &acl) {
  if (acl.aclsysGetVersionStr != nullptr) {
    char package[] = "runtime";
    char text[256] = {};
    if (acl.aclsysGetVersionStr(package, text) == ACL_SUCCESS) {
      text[sizeof text - 1] = '\0';
      const Version version = parse_version(text, "aclsysGetVersionStr");
      if (version.known()) return version;
    }
  }
  if (acl.aclsysGetCANNVersion != nullptr) {
    aclCANNPackageVersion answer{};
    if (acl.aclsysGetCANNVersion(ACL_PKG_NAME_CANN, &answer) == ACL_SUCCESS) {
      answer.version[sizeof answer.version - 1] = '\0';
      return parse_version(answer.version, "aclsysGetCANNVersion");
    }
  }
  return {};
}

Version version_in(const std::string &file, const char *key, const std::string &shown) {
  const std::optional<std::string> text = read_key(file, key);
  return text ? parse_version(*text, shown) : Version{};
}

}  // namespace

std::string system_path(const std::string &path) {
  const char *root = std::getenv("KVLINK_ASCEND_SYSROOT");
  return root == nullptr ? path : root + path;
}

std::optional<std::string> read_key(const std::string &file, const std::string &key) {
  FILE *stream = std::fopen(file.c_str(), "re");
  if (stream == nullptr) return std::nullopt;
  std::optional<std::string> found;
  char line[1024];
  while (!found && std::fgets(line, sizeof line, stream) != nullptr) {
    if (std::strncmp(line, key.c_str(), key.size()) != 0 || line[key.size()] != '=') continue;
    std::string value = line + key.size() + 1;
    value.resize(std::strcspn(value.c_str(), "\r\n"));
    if (value.size() > 1 && value.front() == '"' && value.back() == '"') value = value.substr(1, value.size() - 2);
    found = value;
  }
  std::fclose(stream);
  return found;
}

Toolkit find_toolkit() {
  Toolkit toolkit;
  for (const char *variable : {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"}) {
    const char *value = std::getenv(variable);
    if (value == nullptr || value[0] == '\0') continue;
    toolkit.root = value;
    toolkit.source = variable;
    toolkit.from_variable = true;
    break;
  }
  if (!toolkit.from_variable) {
    for (const char *root : kDefaultRoots) {
      const std::string path = system_path(root);
      if (!is_folder(path)) continue;
      toolkit.root = path;
      toolkit.source = "default";
      break;
    }
  }
  while (toolkit.root.size() > 1 && toolkit.root.back() == '/') toolkit.root.pop_back();
  toolkit.exists = !toolkit.root.empty() && is_folder(toolkit.root);
  if (toolkit.exists) toolkit.set_env = find_set_env(toolkit.root);
  return toolkit;
}

std::string Version::describe() const {
  if (text.empty()) return "of unknown version";
  return text + " (" + source + ")";
}

Version parse_version(const std::string &text, const std::string &source) {
  Version version;
  version.text = text;
  version.source = source;
  int major = 0, minor = 0, patch = 0;
  const int fields = std::sscanf(text.c_str(), "%d.%d.%d", &major, &minor, &patch);
  if (fields >= 2 && major >= kFirstPublicMajor) {
    version.major = major;
    version.minor = minor;
    version.patch = fields == 3 ? patch : 0;  // "8.3.RC1" has none
  }
  return version;
}

Version cann_version(const Toolkit &toolkit, const AclApi *acl) {
  Version version;
  if (acl != nullptr) version = ask_library(*acl);
  if (version.known() || !toolkit.exists) return version;
  version = version_in(toolkit.root + "/share/info/runtime/version.info", "Version", "share/info/runtime/version.info");
  if (version.known()) return version;
  const std::string install = "/" + machine() + "-linux/ascend_toolkit_install.info";
  version = version_in(toolkit.root + install, "version", "ascend_toolkit_install.info");
  if (version.known()) return version;
  // No file says it; the place of set_env.sh tells the generations apart.
  Version guess;
  if (toolkit.set_env == toolkit.root + "/set_env.sh") {
    guess.text = "8.5 or later";
    guess.source = "layout of " + toolkit.root;
  } else if (!toolkit.set_env.empty()) {
    guess.text = "before 8.5";
    guess.source = "layout of " + toolkit.root;
  }
  return guess;
}

Version driver_version() {
  const std::string file = system_path(kDriverInfo);
  const std::optional<std::string> text = read_key(file, "Version");
  return text ? parse_version(*text, kDriverInfo) : Version{};
}

std::string version_warning(const Version &cann) {
  if (!cann.known()) {
    return "the CANN version is unknown (" + (cann.text.empty() ? std::string("nothing says it") : cann.describe()) +
           "); what kvlink can do is decided by the functions found";
  }
  if (cann.major > kLastTestedMajor || (cann.major == kLastTestedMajor && cann.minor > kLastTestedMinor)) {
    return "CANN " + cann.text + " is newer than " + std::to_string(kLastTestedMajor) + "." +
           std::to_string(kLastTestedMinor) + ", the newest that kvlink was built for";
  }
  return {};
}

}  // namespace kvlink::ascend
