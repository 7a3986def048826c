// The JSON that rank tables, and HIXL's GlobalResourceConfig and LocalCommRes, are written in: a small strict reader.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cann_sim::hccl {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };
  Kind kind = Kind::null;
  std::string text;  // a string's characters, or a number as written
  std::vector<Json> items;
  std::map<std::string, Json> members;

  bool is_string() const { return kind == Kind::string; }
  const Json *find(const std::string &key) const;
};

// The whole text is one value, nested at most 16 deep; anything else is nullopt.
std::optional<Json> parse_json(std::string_view text);

}  // namespace cann_sim::hccl
