#include "hccl_env.h"

#include <cstdlib>
#include <mutex>

#include "hccl_refused.h"

namespace cann_sim::hccl {
namespace {

std::optional<std::string> from_process(const char *name) {
  const char *value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

[[noreturn]] void refuse(const char *name, const std::string &value, const char *expected) {
  throw Refused(
      14, HCCL_E_PARA,
      std::string("EI0001: environment variable ") + name + "=" + value + " is invalid, expected " + expected + ".");
}

std::optional<long> decimal(const std::string &text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  return std::strtol(text.c_str(), nullptr, 10);
}

int bounded(std::optional<std::string> (*get)(const char *), const char *name, int fallback, long low, long high,
            long multiple, const char *expected) {
  const auto text = get(name);
  if (!text) return fallback;
  const auto number = decimal(*text);
  if (!number || *number < low || *number > high || *number % multiple != 0) refuse(name, *text, expected);
  return static_cast<int>(*number);
}

std::optional<bool> flag(std::optional<std::string> (*get)(const char *), const char *name) {
  const auto text = get(name);
  if (!text) return std::nullopt;
  if (*text != "0" && *text != "1") refuse(name, *text, "0 or 1");
  return *text == "1";
}

bool choose_roce(std::optional<std::string> (*get)(const char *)) {
  const auto roce = flag(get, "HCCL_INTRA_ROCE_ENABLE");
  const auto pcie = flag(get, "HCCL_INTRA_PCIE_ENABLE");
  if (roce && !pcie && !*roce) refuse("HCCL_INTRA_ROCE_ENABLE", "0", "HCCL_INTRA_PCIE_ENABLE to be set with it");
  if (pcie && !roce && !*pcie) refuse("HCCL_INTRA_PCIE_ENABLE", "0", "HCCL_INTRA_ROCE_ENABLE to be set with it");
  if (roce && pcie && *roce && *pcie) refuse("HCCL_INTRA_ROCE_ENABLE", "1", "not both INTRA variables to be 1");
  return roce && *roce;
}

std::vector<std::pair<std::uint16_t, std::uint16_t>> port_ranges(const std::string &text) {
  constexpr const char *kName = "HCCL_NPU_SOCKET_PORT_RANGE";
  constexpr const char *kExpected = "auto or a-b[,c-d] with ports 1..65535";
  if (text == "auto") return {{0, 0}};
  std::vector<std::pair<std::uint16_t, std::uint16_t>> ranges;
  std::size_t at = 0;
  while (at <= text.size()) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    const std::size_t dash = part.find('-');
    if (dash == std::string::npos) refuse(kName, text, kExpected);
    const auto low = decimal(part.substr(0, dash));
    const auto high = decimal(part.substr(dash + 1));
    if (!low || !high || *low < 1 || *high > 65535 || *low > *high) refuse(kName, text, kExpected);
    ranges.emplace_back(static_cast<std::uint16_t>(*low), static_cast<std::uint16_t>(*high));
    at = end + 1;
  }
  return ranges;
}

}  // namespace

std::int64_t Environment::retry_window_ms() const {
  const double one_try_us = 4.096 * static_cast<double>(1ULL << rdma_timeout_exponent);
  return static_cast<std::int64_t>(one_try_us * rdma_retries / 1000.0);
}

Environment parse_environment(std::optional<std::string> (*get)(const char *name)) {
  Environment out;
  out.roce = choose_roce(get);
  out.connect_timeout_s = bounded(get, "HCCL_CONNECT_TIMEOUT", 120, 120, 7200, 1, "an integer in [120, 7200]");
  out.exec_timeout_s = bounded(get, "HCCL_EXEC_TIMEOUT", 1836, 0, 2147483, 1, "a number of seconds");
  bounded(get, "HCCL_RDMA_TC", 132, 0, 255, 4, "a multiple of 4 in [0, 255]");
  bounded(get, "HCCL_RDMA_SL", 4, 0, 7, 1, "an integer in [0, 7]");
  out.rdma_timeout_exponent = bounded(get, "HCCL_RDMA_TIMEOUT", 20, 5, 24, 1, "an integer in [5, 24]");
  out.rdma_retries = bounded(get, "HCCL_RDMA_RETRY_CNT", 7, 1, 7, 1, "an integer in [1, 7]");
  if (const auto text = get("HCCL_NPU_SOCKET_PORT_RANGE")) out.port_ranges = port_ranges(*text);
  return out;
}

const Environment &environment() {
  static std::once_flag once;
  static Environment parsed;
  static std::optional<std::string> problem;
  std::call_once(once, [] {
    try {
      parsed = parse_environment(from_process);
    } catch (const Refused &refused) {
      problem = refused.what();
    }
  });
  if (problem) throw Refused(14, HCCL_E_PARA, *problem);
  return parsed;
}

}  // namespace cann_sim::hccl
