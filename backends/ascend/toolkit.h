// Where CANN and the driver are installed and which versions they say they are.
//
// Versions appear in messages and in the handshake; what a provider can do is decided by the symbols it finds.
#ifndef KVLINK_ASCEND_TOOLKIT_H
#define KVLINK_ASCEND_TOOLKIT_H

#include <optional>
#include <string>
#include <vector>

namespace kvlink::ascend {

struct AclApi;

// `path` under KVLINK_ASCEND_SYSROOT, which tests and unusual containers set; the path itself without it.
std::string system_path(const std::string &path);

struct Toolkit {
  std::string root;     // ASCEND_HOME_PATH, ASCEND_TOOLKIT_HOME or a default that exists
  std::string source;   // the variable's name, or "default"
  std::string set_env;  // the set_env.sh that belongs to it; empty if there is none
  bool from_variable = false;
  bool exists = false;
};

// The toolkit of this process. With no variable set and no default present, `exists` is false and `root` is empty.
Toolkit find_toolkit();

struct Version {
  std::string text;    // as written: "8.3.RC1", "9.1.0"; empty when nothing says it
  std::string source;  // the file or call that said it
  int major = 0;       // 0: unknown
  int minor = 0;
  int patch = 0;

  bool known() const { return major > 0; }
  bool at_least(int wanted_major, int wanted_minor) const {
    return major > wanted_major || (major == wanted_major && minor >= wanted_minor);
  }
  std::string describe() const;  // "8.5.0 (share/info/runtime/version.info)" or "unknown"
};

// Numbers of a public version; unknown for the internal ones of files before 8.5 ("7.6.T9.0.B057").
Version parse_version(const std::string &text, const std::string &source);

// Asks the library (`acl` may be null), then the version files of `toolkit`, then guesses from its layout.
Version cann_version(const Toolkit &toolkit, const AclApi *acl);
Version driver_version();

// What to say about versions that this release was not tested with; empty for the tested ones.
std::string version_warning(const Version &cann);

// The value of `key` in a "key=value" file; nothing when the file or the key is missing.
std::optional<std::string> read_key(const std::string &file, const std::string &key);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_TOOLKIT_H
