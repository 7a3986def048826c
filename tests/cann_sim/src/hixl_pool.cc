#include "hixl_pool.h"

#include <algorithm>

#include "hixl_engine.h"
#include "hixl_status.h"
#include "sim.h"

namespace cann_sim::hixl_sim {
namespace {

constexpr std::uint64_t kSmall = 256 << 10;

bool holds(const std::vector<Range> &ranges, std::uint64_t start, std::uint64_t bytes) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const Range &range) {
    return range.start <= start && start - range.start <= range.bytes && bytes <= range.start + range.bytes - start;
  });
}

void ask_copy(Channel &channel, Message type, std::uint64_t address, std::uint64_t bytes, const Deadline &deadline) {
  Frame answer;
  try {
    answer = channel.ask(Frame::of(type, CopyRequest{address, bytes}), deadline);
  } catch (const Refused &refused) {
    check_hccl(refused.code, "the buffer pool's control message");
  }
  if (answer.status != 0) throw Refused(28, static_cast<int>(answer.status), "the peer's buffer pool copy failed");
}

}  // namespace

void check_descs(const std::vector<hixl::TransferOpDesc> &descs, bool sync) {
  if (descs.empty() && sync && flavour().number >= 910) {
    throw Refused(26, static_cast<int>(hixl::kParamInvalid), "the list of descriptors is empty");
  }
  for (const hixl::TransferOpDesc &desc : descs) {
    if (desc.local_addr == 0 || desc.remote_addr == 0) {
      throw Refused(26, static_cast<int>(hixl::kParamInvalid), "a descriptor has a null address");
    }
  }
}

bool link_fatal(hixl::Status status) {
  return status != hixl::kParamInvalid && status != hixl::kNotConnected && status != hixl::kAlreadyConnected &&
         status != hixl::kUnsupported && status != hixl::kResourceExhausted;
}

bool needs_pool(Engine &engine, const Channel &channel, const std::vector<hixl::TransferOpDesc> &descs) {
  if (engine.client_pool() == 0) return false;
  return std::any_of(descs.begin(), descs.end(), [&](const hixl::TransferOpDesc &desc) {
    return engine.find_memory(desc.local_addr, desc.len) == nullptr ||
           !holds(channel.remote_memories, desc.remote_addr, desc.len) || (flavour().number < 900 && desc.len < kSmall);
  });
}

void pool_copy(Engine &engine, std::uint64_t pool, std::uint64_t address, std::uint64_t bytes, bool into_pool) {
  count_live("hixl_pool_copies", 1);  // never falls: tests ask whether the pool was used
  auto *at = reinterpret_cast<void *>(address);
  auto *buffer = reinterpret_cast<void *>(pool);
  const Memory *known = engine.find_memory(address, bytes);
  const bool believed_device = known != nullptr && known->type == hixl::MEM_DEVICE;
  if ((locate(at).place == Place::kDevice) != believed_device) {
    throw Refused(
        28, static_cast<int>(kRtParamInvalid),
        "CheckMemCpyAttr: real memory type is not the one given; an unregistered address is taken for host memory");
  }
  check_acl(into_pool ? copy_local(buffer, at, bytes) : copy_local(at, buffer, bytes), "aclrtMemcpy");
}

void bounce(Engine &engine, Channel &channel, bool put, const std::vector<hixl::TransferOpDesc> &descs,
            const Deadline &deadline) {
  if (channel.remote_pool == 0) throw Refused(28, static_cast<int>(hixl::kFailed), "the peer has no buffer pool");
  const auto type_of = [&](const hixl::TransferOpDesc &desc) {
    const Memory *known = engine.find_memory(desc.local_addr, desc.len);
    return known == nullptr ? hixl::MEM_HOST : known->type;
  };
  for (const hixl::TransferOpDesc &desc : descs) {
    if (type_of(desc) != type_of(descs.front())) {
      throw Refused(28, static_cast<int>(hixl::kParamInvalid), "one call mixes device and host memory");
    }
  }
  const std::lock_guard<std::mutex> lock(engine.pool_mutex());
  const std::uint64_t step = std::min(engine.options().pool_bytes(), channel.remote_pool_bytes);
  for (const hixl::TransferOpDesc &desc : descs) {
    for (std::uint64_t done = 0; done < desc.len; done += step) {
      const std::uint64_t bytes = std::min<std::uint64_t>(step, desc.len - done);
      const std::vector<hixl::TransferOpDesc> piece = {{engine.client_pool(), channel.remote_pool, bytes}};
      if (put) {
        pool_copy(engine, engine.client_pool(), desc.local_addr + done, bytes, true);
        engine.transfers().run(channel, true, piece, deadline);
        ask_copy(channel, Message::copy_in, desc.remote_addr + done, bytes, deadline);
      } else {
        ask_copy(channel, Message::copy_out, desc.remote_addr + done, bytes, deadline);
        engine.transfers().run(channel, false, piece, deadline);
        pool_copy(engine, engine.client_pool(), desc.local_addr + done, bytes, false);
      }
    }
  }
}

}  // namespace cann_sim::hixl_sim
