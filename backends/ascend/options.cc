#include "ascend/options.h"

#include "ascend/address.h"
#include "host/suggest.h"

namespace kvlink::ascend {

Failure OptionTable::parse(const kvl_engine_params &params) const {
  for (uint32_t i = 0; i < params.option_count; ++i) {
    const kvl_option &option = params.options[i];
    if (option.name == nullptr || option.value == nullptr) {
      return make_failure(KVL_INVALID, "engine_open", "option %u has a null name or value", i);
    }
    const Item *found = nullptr;
    std::vector<std::string> names;
    for (const Item &item : items_) {
      names.emplace_back(item.name);
      if (names.back() == option.name) found = &item;
    }
    if (found == nullptr) {
      return make_failure(KVL_INVALID, "engine_open", "unknown option '%.60s'; did you mean '%s'?", option.name,
                          host::nearest_name(option.name, names).c_str());
    }
    const Failure failure = set(*found, option.value);
    if (!failure.ok()) return failure;
  }
  return {};
}

Failure OptionTable::set(const Item &item, const std::string &value) const {
  switch (item.kind) {
    case Kind::kText:
    case Kind::kHost:
      if (value.size() < item.low || value.size() > item.high) {
        return make_failure(KVL_INVALID, "engine_open", "option %s has %zu characters; expected %llu to %llu",
                            item.name, value.size(), static_cast<unsigned long long>(item.low),
                            static_cast<unsigned long long>(item.high));
      }
      *item.out_text = value;
      // "[::1]" is how addresses carry IPv6; resolvers want it bare.
      if (item.kind == Kind::kHost && value.size() > 2 && value.front() == '[' && value.back() == ']') {
        *item.out_text = value.substr(1, value.size() - 2);
      }
      return {};
    case Kind::kNumber: {
      unsigned long long number = 0;
      if (!host::parse_whole(value, item.low, item.high, &number)) {
        return make_failure(KVL_INVALID, "engine_open",
                            "option %s is '%.60s'; expected a whole number from %llu to %llu", item.name, value.c_str(),
                            static_cast<unsigned long long>(item.low), static_cast<unsigned long long>(item.high));
      }
      *item.out_number = number;
      return {};
    }
    case Kind::kChoice: {
      std::string words;
      for (size_t i = 0; i < item.words.size(); ++i) {
        if (value == item.words[i]) {
          *item.out_number = i;
          return {};
        }
        words += (i == 0 ? "" : i + 1 == item.words.size() ? " or " : ", ") + item.words[i];
      }
      return make_failure(KVL_INVALID, "engine_open", "option %s is '%.60s'; expected %s", item.name, value.c_str(),
                          words.c_str());
    }
  }
  return make_failure(KVL_INTERNAL, "engine_open", "option %s has no kind", item.name);
}

void CommonOptions::declare(OptionTable *table) {
  table->choice("link", {"auto", "roce", "hccs"}, &link);
  table->text("device_ip", &device_ip);
  table->text("server_id", &server_id);
  table->host("bind_host", &bind_host);
  table->host("advertise_host", &advertise_host);
  table->number("peer_timeout_ms", 1, 86400000, &peer_timeout_ms);
  table->number("max_in_flight", 1, 4096, &max_in_flight);
  table->number("transfer_timeout_ms", 1, 86400000, &transfer_timeout_ms);
  table->number("host_staging", 0, uint64_t{1} << 40, &host_staging);
  table->number("host_staging_links", 1, 256, &host_staging_links);
}

Failure CommonOptions::complete() {
  if (advertise_host.empty()) {
    advertise_host = bind_host == "0.0.0.0" || bind_host == "::" ? "127.0.0.1" : bind_host;
  }
  if (server_id.empty()) server_id = advertise_host;
  if (server_id.size() > 64) server_id.resize(64);
  if (!device_ip.empty() && !is_ip_address(device_ip)) {
    return make_failure(KVL_INVALID, "engine_open", "option device_ip is '%.60s'; expected an IPv4 or IPv6 address",
                        device_ip.c_str());
  }
  if (host_staging > 0 && host_staging < kLeastStaging) {
    return make_failure(KVL_INVALID, "engine_open",
                        "option host_staging is %llu; expected 0 (off) or at least %llu bytes",
                        static_cast<unsigned long long>(host_staging), static_cast<unsigned long long>(kLeastStaging));
  }
  return {};
}

}  // namespace kvlink::ascend
