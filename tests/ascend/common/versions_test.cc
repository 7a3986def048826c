// Where CANN is and which version it says: both layouts, the internal-number trap, missing files, the driver.
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "ascend/toolkit.h"
#include "native/host/harness.h"

using namespace kvlink::ascend;

namespace {

std::string root;

void write_file(const std::string &path, const std::string &text) {
  for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) {
    mkdir(path.substr(0, at).c_str(), 0755);
  }
  std::ofstream(path) << text;
}

std::string machine() {
  utsname name{};
  CHECK(uname(&name) == 0);
  return name.machine;
}

void use(const char *variable, const std::string &value) {
  unsetenv("ASCEND_HOME_PATH");
  unsetenv("ASCEND_TOOLKIT_HOME");
  if (variable != nullptr) setenv(variable, value.c_str(), 1);
}

void test_parse() {
  const struct {
    const char *text;
    int major, minor, patch;
  } cases[] = {{"8.3.RC1", 8, 3, 0}, {"8.5.0", 8, 5, 0},  {"8.5.0-beta.1", 8, 5, 0},  {"8.5.0.alpha001", 8, 5, 0},
               {"9.1.0", 9, 1, 0},   {"9.0.1", 9, 0, 1},  {"9.2.0-beta.2", 9, 2, 0},  {"24.1.rc3", 24, 1, 0},
               {"10.0.0", 10, 0, 0}, {"25.5", 25, 5, 0},  {"7.6.T9.0.B057", 0, 0, 0}, {"7.7.T20.0.B210", 0, 0, 0},
               {"", 0, 0, 0},        {"rubbish", 0, 0, 0}};
  for (const auto &item : cases) {
    const Version version = parse_version(item.text, "test");
    CHECK_EQ(version.major, item.major);
    CHECK_EQ(version.minor, item.minor);
    CHECK_EQ(version.patch, item.patch);
    CHECK(version.text == item.text);
    CHECK_EQ(version.known(), item.major > 0);
  }
  CHECK(parse_version("8.5.0", "").at_least(8, 5));
  CHECK(!parse_version("8.3.RC1", "").at_least(8, 5));
  CHECK(parse_version("9.0.0", "").at_least(8, 5));
}

void test_new_layout() {
  const std::string home = root + "/new";
  write_file(home + "/share/info/runtime/version.info", "Version=8.5.0\nversion_dir=cann\n");
  write_file(home + "/set_env.sh", "# sets the environment\n");
  use("ASCEND_HOME_PATH", home + "/");
  const Toolkit toolkit = find_toolkit();
  CHECK(toolkit.exists && toolkit.from_variable);
  CHECK(toolkit.root == home);
  CHECK(toolkit.set_env == home + "/set_env.sh");
  const Version version = cann_version(toolkit, nullptr);
  CHECK(version.text == "8.5.0");
  CHECK(version.source == "share/info/runtime/version.info");
  CHECK(version.describe() == "8.5.0 (share/info/runtime/version.info)");
}

void test_old_layout() {
  const std::string home = root + "/old/8.3.RC1";
  // The trap: an internal number under the same key, in the file that is asked first.
  write_file(home + "/share/info/runtime/version.info", "Version=7.7.T20.0.B210\n");
  write_file(home + "/" + machine() + "-linux/ascend_toolkit_install.info",
             "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23SPC001B231\n");
  write_file(root + "/old/set_env.sh", "\n");
  use("ASCEND_TOOLKIT_HOME", home);
  const Toolkit toolkit = find_toolkit();
  CHECK(toolkit.source == "ASCEND_TOOLKIT_HOME");
  CHECK(toolkit.set_env == home + "/../set_env.sh");
  const Version version = cann_version(toolkit, nullptr);
  CHECK(version.text == "8.3.RC1");
  CHECK_EQ(version.minor, 3);
}

void test_unknown() {
  const std::string home = root + "/bare";
  write_file(home + "/set_env.sh", "\n");
  use("ASCEND_HOME_PATH", home);
  Version version = cann_version(find_toolkit(), nullptr);
  CHECK(!version.known());
  CHECK(version.text == "8.5 or later");
  CHECK(version_warning(version).find("unknown") != std::string::npos);
  use("ASCEND_HOME_PATH", root + "/not-there");
  CHECK(!find_toolkit().exists);
  CHECK(find_toolkit().from_variable);
  version = cann_version(find_toolkit(), nullptr);
  CHECK(version.describe() == "of unknown version");
  CHECK(version_warning(parse_version("8.5.0", "")).empty());
  CHECK(version_warning(parse_version("9.1.0", "")).empty());
  CHECK(version_warning(parse_version("9.2.0-beta.2", "")).find("newer") != std::string::npos);
}

void test_defaults_and_driver() {
  use(nullptr, "");
  setenv("KVLINK_ASCEND_SYSROOT", (root + "/sysroot").c_str(), 1);
  CHECK(!find_toolkit().exists);
  CHECK(!driver_version().known());
  write_file(root + "/sysroot/usr/local/Ascend/ascend-toolkit/latest/set_env.sh", "\n");
  CHECK(find_toolkit().root == root + "/sysroot/usr/local/Ascend/ascend-toolkit/latest");
  write_file(root + "/sysroot/usr/local/Ascend/cann/set_env.sh", "\n");
  CHECK(find_toolkit().root == root + "/sysroot/usr/local/Ascend/cann");
  CHECK(find_toolkit().source == "default");
  write_file(root + "/sysroot/usr/local/Ascend/driver/version.info",
             "Version=24.1.rc3\nascendhal_version=7.35.23\nVersionX=1\n");
  CHECK(driver_version().text == "24.1.rc3");
  CHECK_EQ(driver_version().major, 24);
}

void test_read_key() {
  const std::string file = root + "/keys";
  write_file(file, "prefix_version=1\nversion=\"9.0\"\r\nversion=later\n");
  CHECK(*read_key(file, "version") == "9.0");
  CHECK(!read_key(file, "ersion").has_value());
  CHECK(!read_key(file + ".none", "version").has_value());
}

}  // namespace

int main() {
  char folder[] = "/tmp/kvlink-versions-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  root = folder;
  test_parse();
  test_new_layout();
  test_old_layout();
  test_unknown();
  test_defaults_and_driver();
  test_read_key();
  CHECK(std::system(("rm -rf '" + root + "'").c_str()) == 0);
  std::puts("versions: passed");
  return 0;
}
