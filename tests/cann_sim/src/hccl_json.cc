#include "hccl_json.h"

namespace cann_sim::hccl {
namespace {

constexpr int kMaxDepth = 16;

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  bool whole(Json *out) { return value(out, 0) && (skip(), at_ == text_.size()); }

 private:
  void skip() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }
  bool take(char wanted) {
    skip();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) return false;
    at_ += wanted.size();
    return true;
  }
  bool value(Json *out, int depth) {
    skip();
    if (depth > kMaxDepth || at_ >= text_.size()) return false;
    switch (text_[at_]) {
      case '{':
        return object(out, depth);
      case '[':
        return array(out, depth);
      case '"':
        out->kind = Json::Kind::string;
        return string(&out->text);
      case 't':
        return scalar(out, Json::Kind::boolean, "true");
      case 'f':
        return scalar(out, Json::Kind::boolean, "false");
      case 'n':
        return scalar(out, Json::Kind::null, "null");
      default:
        return number(out);
    }
  }
  bool scalar(Json *out, Json::Kind kind, std::string_view wanted) {
    out->kind = kind;
    out->text = wanted;
    return word(wanted);
  }
  bool number(Json *out) {
    const std::size_t start = at_;
    while (at_ < text_.size() && std::string_view("+-.0123456789eE").find(text_[at_]) != std::string_view::npos) ++at_;
    out->kind = Json::Kind::number;
    out->text = text_.substr(start, at_ - start);
    return at_ > start;
  }
  bool string(std::string *out) {
    if (!take('"')) return false;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c == '\\') {
        if (at_ >= text_.size()) return false;
        c = text_[at_++];
        if (c == 'u') return false;  // no field of these documents needs one
        if (c == 'n') c = '\n';
        if (c == 't') c = '\t';
      }
      out->push_back(c);
    }
    return take('"');
  }
  bool array(Json *out, int depth) {
    out->kind = Json::Kind::array;
    ++at_;
    if (take(']')) return true;
    do {
      out->items.emplace_back();
      if (!value(&out->items.back(), depth + 1)) return false;
    } while (take(','));
    return take(']');
  }
  bool object(Json *out, int depth) {
    out->kind = Json::Kind::object;
    ++at_;
    if (take('}')) return true;
    do {
      skip();
      std::string key;
      if (!string(&key) || !take(':') || !value(&out->members[key], depth + 1)) return false;
    } while (take(','));
    return take('}');
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const Json *Json::find(const std::string &key) const {
  const auto found = members.find(key);
  return found == members.end() ? nullptr : &found->second;
}

std::optional<Json> parse_json(std::string_view text) {
  Json root;
  if (!Reader(text).whole(&root)) return std::nullopt;
  return root;
}

}  // namespace cann_sim::hccl
