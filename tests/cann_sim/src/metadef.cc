// libmetadef.so: the out-of-line members of ge::AscendString.
#include <functional>
#include <string>

#include "hixl_abi.h"

namespace ge {
namespace {

const std::string &text(const std::shared_ptr<std::string> &name) {
  static const auto &empty = *new std::string;
  return name ? *name : empty;
}

}  // namespace

AscendString::AscendString(const char *name) : name_(name == nullptr ? nullptr : std::make_shared<std::string>(name)) {}
AscendString::AscendString(const char *name, std::size_t length)
    : name_(name == nullptr ? nullptr : std::make_shared<std::string>(name, length)) {}
const char *AscendString::GetString() const { return text(name_).c_str(); }
std::size_t AscendString::GetLength() const { return text(name_).size(); }
std::size_t AscendString::Find(const AscendString &other) const { return text(name_).find(text(other.name_)); }
std::size_t AscendString::Hash() const { return std::hash<std::string>()(text(name_)); }
bool AscendString::operator<(const AscendString &other) const { return text(name_) < text(other.name_); }
bool AscendString::operator>(const AscendString &other) const { return text(name_) > text(other.name_); }
bool AscendString::operator<=(const AscendString &other) const { return text(name_) <= text(other.name_); }
bool AscendString::operator>=(const AscendString &other) const { return text(name_) >= text(other.name_); }
bool AscendString::operator==(const AscendString &other) const { return text(name_) == text(other.name_); }
bool AscendString::operator!=(const AscendString &other) const { return text(name_) != text(other.name_); }

}  // namespace ge
