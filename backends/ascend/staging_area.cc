// The area: its arena, its parts, its listener, and the directory of links that wait for a side connection.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "ascend/errors.h"
#include "ascend/staging_impl.h"

namespace kvlink::ascend {

void Parts::reset(uint64_t base, uint64_t part_bytes, uint32_t count) {
  base_ = base;
  bytes_ = part_bytes;
  count_ = count;
  free_.clear();
  for (uint32_t i = count; i > 0; --i) free_.push_back(i - 1);
}

uint32_t Parts::take() {
  if (free_.empty()) return kNoPart;
  const uint32_t part = free_.back();
  free_.pop_back();
  return part;
}

StagingArea::Impl::Impl(std::shared_ptr<const Device> device, Memory &memory_in, EventLoop &loop_in,
                        CompletionQueue &completions_in, uint32_t path_in, const CommonOptions &options_in)
    : memory(memory_in),
      loop(loop_in),
      completions(completions_in),
      path(path_in),
      options(options_in),
      device_(std::move(device)) {}

Failure StagingArea::Impl::start() {
  if (options.host_staging == 0) return {};
  const uint64_t half = options.host_staging / 2;
  const uint64_t window = half / options.host_staging_links / kPage * kPage;
  if (window < kLeastWindow) {
    return make_failure(KVL_INVALID, "engine_open",
                        "option host_staging is %" PRIu64 " bytes for %" PRIu64 " links; expected at least %" PRIu64
                        " (or fewer host_staging_links)",
                        options.host_staging, options.host_staging_links,
                        2 * kLeastWindow * options.host_staging_links);
  }
  arena_bytes = options.host_staging / kPage * kPage;
  // Over HCCS a peer's host memory is out of reach: where a link may become HCCS, the arena is device memory. The CPU
  // then copies to and from it through the driver; the regions themselves are not registered either way.
  LinkEnvironment environment;
  const Failure unclear = read_link_environment(&environment);
  const bool hccs_soc = device_->soc() == SocFamily::kA2 || device_->soc() == SocFamily::kA3;
  on_device = hccs_soc && !(unclear.ok() && environment.intra_roce);
  const uint32_t kind = on_device ? KVL_MEMORY_DEVICE : KVL_MEMORY_HOST;
  Failure failure = memory.allocate(kind, arena_bytes, &arena);
  if (failure.ok()) failure = memory.open_internal(arena, arena_bytes, &region, kind);
  if (failure.ok() && on_device) {
    failure = memory.allocate(KVL_MEMORY_HOST, kMaxStepBytes, &scratch);
    scratch_bytes = kMaxStepBytes;
  }
  if (!failure.ok()) {
    failure.message = "the staging area of " + std::to_string(arena_bytes) + " bytes: " + failure.message;
    return failure;
  }
  const uint64_t chunk = std::min(kMaxStepBytes, half / 4 / kPage * kPage);
  chunks.reset(arena, chunk, static_cast<uint32_t>(half / kPage * kPage / chunk));
  windows.reset(arena + half / kPage * kPage, window, static_cast<uint32_t>(options.host_staging_links));
  listener = std::make_unique<SideListener>(loop, *this);
  const auto lock = loop.lock();
  return listener->open(options.bind_host);
}

void StagingArea::Impl::close() {
  {
    const auto lock = loop.lock();
    if (listener != nullptr) {
      listener->close();
      loop.bury(std::move(listener));
    }
  }
  if (scratch != 0) memory.free(scratch);
  if (arena == 0) return;
  // A part that no link released may still be written by the vendor: the arena then stays until the process ends.
  if (region != nullptr) {
    if (!chunks.whole() || !windows.whole() || !memory.close_internal(region).ok()) return;
  }
  memory.free(arena);
}

Failure StagingArea::Impl::copy_device(uint64_t place, uint64_t length, bool to_device) {
  const ContextGuard guard = device_->enter();
  if (!guard.ok()) return guard.failure();
  void *host = reinterpret_cast<void *>(scratch), *inside = reinterpret_cast<void *>(place);
  const AclApi &acl = device_->acl();
  const aclError code = to_device ? acl.aclrtMemcpy(inside, length, host, length, ACL_MEMCPY_HOST_TO_DEVICE)
                                  : acl.aclrtMemcpy(host, length, inside, length, ACL_MEMCPY_DEVICE_TO_HOST);
  if (code == ACL_SUCCESS) return {};
  return vendor_failure(&acl, Vendor::kAcl, "aclrtMemcpy", code, "%" PRIu64 " bytes of the staging area", length);
}

// Fills the scratch memory piece by piece and sends it on when it is full, or memory the CPU reaches directly.
Failure StagingArea::Impl::gather(uint64_t place, const RegionPiece *pieces, size_t count) {
  uint64_t filled = 0;
  for (size_t i = 0; i < count; ++i) {
    for (uint64_t at = 0; at < pieces[i].length;) {
      const uint64_t room = on_device ? scratch_bytes - filled : UINT64_MAX;
      const uint64_t length = std::min(pieces[i].length - at, room);
      std::memcpy(reinterpret_cast<void *>((on_device ? scratch : place) + filled),
                  reinterpret_cast<const void *>(pieces[i].address + at), length);
      at += length;
      filled += length;
      if (!on_device || filled < scratch_bytes) continue;
      const Failure failure = copy_device(place, filled, true);
      if (!failure.ok()) return failure;
      place += filled;
      filled = 0;
    }
  }
  return on_device && filled > 0 ? copy_device(place, filled, true) : Failure{};
}

Failure StagingArea::Impl::scatter(uint64_t place, const RegionPiece *pieces, size_t count) {
  uint64_t left = 0;  // of the whole, not yet in the scratch memory
  for (size_t i = 0; i < count; ++i) left += pieces[i].length;
  uint64_t taken = 0, held = 0;  // of what is in the scratch memory
  for (size_t i = 0; i < count; ++i) {
    for (uint64_t at = 0; at < pieces[i].length;) {
      if (on_device && taken == held) {
        held = std::min(left, scratch_bytes);
        const Failure failure = copy_device(place, held, false);
        if (!failure.ok()) return failure;
        place += held;
        left -= held;
        taken = 0;
      }
      const uint64_t length = std::min(pieces[i].length - at, on_device ? held - taken : UINT64_MAX);
      std::memcpy(reinterpret_cast<void *>(pieces[i].address + at),
                  reinterpret_cast<const void *>((on_device ? scratch : place) + taken), length);
      at += length;
      taken += length;
    }
  }
  return {};
}

const SessionKey *StagingArea::Impl::find_key(const SessionId &session) {
  for (StagingLink::Impl *link : links) {
    if (link->session() == session && link->awaits_connection()) return &link->key();
  }
  return nullptr;
}

void StagingArea::Impl::admit(const SessionId &session, UniqueFd socket) {
  for (StagingLink::Impl *link : links) {
    if (link->session() == session && link->awaits_connection()) return link->attach(std::move(socket));
  }
}

void StagingArea::Impl::remove(StagingLink::Impl *link) {
  links.erase(std::remove(links.begin(), links.end(), link), links.end());
}

// ---- the public face

StagingArea::StagingArea(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

StagingArea::~StagingArea() { impl_->close(); }

Failure StagingArea::open(std::shared_ptr<const Device> device, const CommonOptions &options, Memory &memory,
                          EventLoop &loop, CompletionQueue &completions, uint32_t path,
                          std::unique_ptr<StagingArea> *area) {
  std::unique_ptr<StagingArea> opened(
      new StagingArea(std::make_unique<Impl>(std::move(device), memory, loop, completions, path, options)));
  const Failure failure = opened->impl_->start();
  if (failure.ok()) *area = std::move(opened);
  return failure;
}

bool StagingArea::enabled() const { return impl_->arena != 0; }

Failure StagingArea::open_link(const kvl_link_params &params, const RemoteTable &remotes, BatchIssuer &issuer,
                               std::unique_ptr<StagingLink> *link) {
  auto made = std::make_unique<StagingLink::Impl>(*impl_, params, remotes, issuer);
  const Failure failure = made->open();
  if (failure.ok()) link->reset(new StagingLink(std::move(made)));
  return failure;
}

void StagingArea::statistics(uint64_t *staged_bytes, uint64_t *served_bytes, uint64_t *refused) const {
  *staged_bytes = impl_->staged_bytes.load();
  *served_bytes = impl_->served_bytes.load();
  *refused = impl_->refused_.load();
}

}  // namespace kvlink::ascend
