// Options of a provider as a table: names, kinds and limits, checked by name and value.
#ifndef KVLINK_ASCEND_OPTIONS_H
#define KVLINK_ASCEND_OPTIONS_H

#include <cstdint>
#include <string>
#include <vector>

#include "ascend/link_type.h"

namespace kvlink::ascend {

class OptionTable {
 public:
  void text(const char *name, std::string *out) { add({name, Kind::kText, 0, 255, {}, out, nullptr}); }
  void host(const char *name, std::string *out) { add({name, Kind::kHost, 1, 255, {}, out, nullptr}); }
  void number(const char *name, uint64_t low, uint64_t high, uint64_t *out) {
    add({name, Kind::kNumber, low, high, {}, nullptr, out});
  }
  // The index of the chosen word.
  void choice(const char *name, std::vector<std::string> words, uint64_t *out) {
    add({name, Kind::kChoice, 0, 0, std::move(words), nullptr, out});
  }

  // INVALID for an unknown name (with the nearest valid one) and for a bad value (with what is expected).
  Failure parse(const kvl_engine_params &params) const;

 private:
  enum class Kind { kText, kHost, kNumber, kChoice };
  struct Item {
    const char *name;
    Kind kind;
    uint64_t low, high;
    std::vector<std::string> words;
    std::string *out_text;
    uint64_t *out_number;
  };
  void add(Item item) { items_.push_back(std::move(item)); }
  Failure set(const Item &item, const std::string &value) const;

  std::vector<Item> items_;
};

constexpr uint64_t kLeastStaging = uint64_t{1} << 20;

// What all three providers take.
struct CommonOptions {
  uint64_t link = 0;                     // enum LinkOption: auto, roce, hccs
  std::string device_ip;                 // instead of hccn.conf and hccn_tool
  std::string server_id;                 // instead of advertise_host
  std::string bind_host = "127.0.0.1";   // set by the core
  std::string advertise_host;            // set by the core
  uint64_t peer_timeout_ms = 3000;       // set by the core
  uint64_t max_in_flight = 64;           // submits accepted and not complete, per link; then AGAIN
  uint64_t transfer_timeout_ms = 60000;  // of a transfer whose caller gave no deadline
  uint64_t host_staging = 0;             // bytes of the host staging area; 0 = off
  uint64_t host_staging_links = 8;       // links that may be served from it at once

  LinkOption link_option() const { return static_cast<LinkOption>(link); }
  void declare(OptionTable *table);  // adds them to a provider's table
  Failure complete();                // after parse: fills what follows from the others and checks the rest
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_OPTIONS_H
