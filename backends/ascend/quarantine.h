// Memory that the vendor's DMA may still touch: it is not given back until the link is dead on both sides.
#ifndef KVLINK_ASCEND_QUARANTINE_H
#define KVLINK_ASCEND_QUARANTINE_H

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "ascend/library.h"

namespace kvlink::ascend {

class Quarantine {
 public:
  // `why` ends the sentence "... may still be written: <why>". Returns an id for release.
  uint64_t add(uint64_t address, uint64_t length, const std::string &why);
  void release(uint64_t id);
  // BUSY naming the reason when any of [address, +length) is held, else OK.
  Failure check(uint64_t address, uint64_t length, const char *site) const;
  uint64_t bytes() const;

 private:
  struct Item {
    uint64_t address, length;
    std::string why;
  };
  mutable std::mutex mutex_;
  std::map<uint64_t, Item> items_;
  uint64_t next_ = 1;
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_QUARANTINE_H
