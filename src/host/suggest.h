// "Did you mean ...?": the valid name that is closest to a wrong one.
#ifndef KVLINK_HOST_SUGGEST_H
#define KVLINK_HOST_SUGGEST_H

#include <string>
#include <vector>

namespace kvlink::host {

// The name with the smallest edit distance; `names` is not empty.
std::string nearest_name(const std::string &name, const std::vector<std::string> &names);

// A whole number without sign from `low` to `high`, and nothing else.
bool parse_whole(const std::string &text, unsigned long long low, unsigned long long high, unsigned long long *number);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_SUGGEST_H
