// The exporter's side: copies between a link's window and staged regions, on the word of an authenticated peer that is
// not trusted with a single offset.
#include "ascend/staging_impl.h"

namespace kvlink::ascend {

kvl_status StagingLink::Impl::serve(Serve what, const SideHeader &header, const SideEntry *table) {
  const auto refuse = [this](kvl_status status) {
    area_.refused_.fetch_add(1);
    return status;
  };
  if (window_ == kNoPart || stopped_) return refuse(KVL_UNSUPPORTED);
  const uint64_t window_bytes = area_.windows.bytes();
  if (header.window_offset > window_bytes) return refuse(KVL_INVALID);
  uint64_t total = 0;
  for (uint32_t i = 0; i < header.count; ++i) total += table[i].length;
  if (total > window_bytes - header.window_offset) return refuse(KVL_INVALID);
  const uint32_t needed = what == Serve::kCommit ? KVL_ACCESS_WRITE : KVL_ACCESS_READ;
  // Held until the last byte: mem_close of a region waits for it.
  RegionTable::Reader regions(area_.memory.regions());
  for (uint32_t i = 0; i < header.count; ++i) {
    const Region *region = regions.find(table[i].mem);
    if (region == nullptr || !region->staged || (region->access & needed) == 0) return refuse(KVL_DENIED);
    if (table[i].offset > region->length || table[i].length > region->length - table[i].offset) {
      return refuse(KVL_INVALID);
    }
  }
  RegionPiece pieces[kMaxSideEntries];
  for (uint32_t i = 0; i < header.count; ++i) {
    pieces[i] = {regions.find(table[i].mem)->address + table[i].offset, table[i].length};
  }
  const uint64_t place = area_.windows.address(window_) + header.window_offset;
  const Failure failure =
      what == Serve::kCommit ? area_.scatter(place, pieces, header.count) : area_.gather(place, pieces, header.count);
  if (!failure.ok()) return refuse(failure.status);
  area_.served_bytes.fetch_add(total);
  return KVL_OK;
}

}  // namespace kvlink::ascend
