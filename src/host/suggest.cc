#include "suggest.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

namespace kvlink::host {
namespace {

size_t edit_distance(const std::string &a, const std::string &b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

}  // namespace

std::string nearest_name(const std::string &name, const std::vector<std::string> &names) {
  return *std::min_element(names.begin(), names.end(), [&](const std::string &a, const std::string &b) {
    return edit_distance(name, a) < edit_distance(name, b);
  });
}

bool parse_whole(const std::string &text, unsigned long long low, unsigned long long high, unsigned long long *number) {
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) return false;
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), nullptr, 10);
  if (errno != 0 || value < low || value > high) return false;
  *number = value;
  return true;
}

}  // namespace kvlink::host
