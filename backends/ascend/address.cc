#include "ascend/address.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "ascend/event_loop.h"
#include "ascend/toolkit.h"

extern char **environ;

namespace kvlink::ascend {
namespace {

constexpr const char *kHccnConf = "/etc/hccn.conf";
constexpr const char *kHccnTool = "/usr/local/Ascend/driver/tools/hccn_tool";
constexpr size_t kMaxText = 256 * 1024;

std::string trimmed(const std::string &text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

// The address after `key` in the line that begins with it.
std::string address_after(const std::string &text, const std::string &key) {
  size_t at = 0;
  while (at < text.size()) {
    size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    const std::string line = trimmed(text.substr(at, end - at));
    if (line.compare(0, key.size(), key) == 0) {
      const std::string value = trimmed(line.substr(key.size()));
      if (is_ip_address(value)) return value;
    }
    at = end + 1;
  }
  return {};
}

std::string read_file(const std::string &path) {
  FILE *file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return {};
  std::string text(kMaxText, '\0');
  text.resize(std::fread(&text[0], 1, text.size(), file));
  std::fclose(file);
  return text;
}

// Output of a short program; empty when it cannot run or is not done in time (it is then killed).
std::string run_tool(const std::string &path, int32_t device, uint32_t timeout_ms) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return {};
  UniqueFd out(ends[0]), in(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, in.get(), 1);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  const std::string number = std::to_string(device);
  const char *arguments[] = {"hccn_tool", "-i", number.c_str(), "-ip", "-g", nullptr};
  pid_t child = 0;
  const int status =
      posix_spawnp(&child, path.c_str(), &actions, nullptr, const_cast<char *const *>(arguments), environ);
  posix_spawn_file_actions_destroy(&actions);
  in.reset();
  if (status != 0) return {};
  const Deadline deadline{now_ns() + uint64_t{timeout_ms} * 1000000, -1};
  std::string text;
  bool ended = false;
  while (!ended && text.size() < kMaxText && host::wait_for(out.get(), POLLIN, deadline, "hccn_tool").ok()) {
    char part[4096];
    const ssize_t got = read(out.get(), part, sizeof part);
    if (got > 0) {
      text.append(part, static_cast<size_t>(got));
    } else if (got == 0 || errno != EINTR) {
      ended = true;
    }
  }
  if (!ended) kill(child, SIGKILL);
  int exit_status = 0;
  pid_t waited;
  do {
    waited = waitpid(child, &exit_status, 0);
  } while (waited < 0 && errno == EINTR);
  // A process that reaps all children itself leaves none to wait for; the text then speaks for itself.
  const bool well = waited < 0 || (WIFEXITED(exit_status) && WEXITSTATUS(exit_status) == 0);
  return ended && well ? text : std::string();
}

}  // namespace

bool is_ip_address(const std::string &text) {
  unsigned char bytes[sizeof(in6_addr)];
  return inet_pton(AF_INET, text.c_str(), bytes) == 1 || inet_pton(AF_INET6, text.c_str(), bytes) == 1;
}

std::string address_in_hccn_conf(const std::string &text, int32_t physical_device) {
  const std::string number = std::to_string(physical_device);
  const std::string ipv4 = address_after(text, "address_" + number + "=");
  return ipv4.empty() ? address_after(text, "IPv6address_" + number + "=") : ipv4;
}

std::string address_in_tool_output(const std::string &text) { return address_after(text, "ipaddr:"); }

DeviceAddress find_device_address(int32_t physical_device, const std::string &configured, uint32_t tool_timeout_ms) {
  DeviceAddress address;
  if (!configured.empty()) {
    address.ip = configured;
    address.source = "option device_ip";
    return address;
  }
  const std::string file = system_path(kHccnConf);
  const std::string text = read_file(file);
  address.tried = file + (text.empty() ? " (missing or unreadable)"
                                       : " (no address_" + std::to_string(physical_device) + " in it)");
  if (physical_device < 0) return address;
  address.ip = address_in_hccn_conf(text, physical_device);
  if (!address.ip.empty()) {
    address.source = file;
    return address;
  }
  for (const std::string &tool : {system_path(kHccnTool), std::string("hccn_tool")}) {
    address.ip = address_in_tool_output(run_tool(tool, physical_device, tool_timeout_ms));
    if (address.ip.empty()) continue;
    address.source = tool;
    return address;
  }
  address.tried += ", hccn_tool (no answer)";
  return address;
}

Failure missing_device_address(const DeviceAddress &address, int32_t physical_device, const char *site) {
  return make_failure(KVL_UNAVAILABLE, site,
                      "a RoCE link needs the IP address of NPU %d (physical id), and none was found; tried %s. Mount "
                      "/etc/hccn.conf into this container or set option device_ip",
                      physical_device, address.tried.c_str());
}

}  // namespace kvlink::ascend
