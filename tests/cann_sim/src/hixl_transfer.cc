#include "hixl_transfer.h"

#include <algorithm>

#include "hixl_status.h"
#include "sim.h"

namespace cann_sim::hixl_sim {
namespace {

constexpr std::size_t kBatch = 256;

void enqueue_batches(Channel &channel, bool put, const std::vector<hixl::TransferOpDesc> &descs,
                     const StreamPtr &stream) {
  std::vector<HcclOneSideOpDesc> batch;
  for (std::size_t at = 0; at < descs.size(); at += kBatch) {
    batch.clear();
    const std::size_t end = std::min(descs.size(), at + kBatch);
    for (std::size_t i = at; i < end; ++i) {
      batch.push_back({reinterpret_cast<void *>(descs[i].local_addr), reinterpret_cast<void *>(descs[i].remote_addr),
                       descs[i].len, HCCL_DATA_TYPE_UINT8});
    }
    const auto call = put ? hccl_api().put : hccl_api().get;
    check_hccl(call(channel.link.comm(), channel.link.peer_rank(), batch.data(), static_cast<u32>(batch.size()),
                    stream_handle(stream)),
               put ? "HcclBatchPut" : "HcclBatchGet");
  }
}

}  // namespace

Transfers::~Transfers() {
  for (const auto &[number, request] : requests_) destroy_stream(request.stream, true);
  for (const StreamPtr &stream : idle_) destroy_stream(stream, false);
}

StreamPtr Transfers::take_stream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      StreamPtr stream = idle_.back();
      idle_.pop_back();
      return stream;
    }
    if (streams_ >= max_streams_) {
      throw Refused(26, static_cast<int>(hixl::kResourceExhausted), "all streams are in use; poll what is in flight");
    }
    ++streams_;
  }
  StreamPtr stream;
  const int code = create_stream(0, &stream);
  if (code != kAclOk) {
    const std::lock_guard<std::mutex> lock(mutex_);
    --streams_;
    throw Refused(26, static_cast<int>(hixl::kResourceExhausted), "aclrtCreateStream: " + std::to_string(code));
  }
  return stream;
}

void Transfers::give_stream(const StreamPtr &stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(stream);
}

void Transfers::destroy(const StreamPtr &stream) {
  destroy_stream(stream, true);
  const std::lock_guard<std::mutex> lock(mutex_);
  --streams_;
}

void Transfers::run(Channel &channel, bool put, const std::vector<hixl::TransferOpDesc> &descs,
                    const Deadline &deadline) {
  const StreamPtr stream = take_stream();
  try {
    enqueue_batches(channel, put, descs, stream);
    // A copy that was begun is not undone by the deadline: the buffers stay in use until the link is closed.
    check_acl(synchronize(stream, std::max(1, deadline.left_ms(1 << 30))), "aclrtSynchronizeStreamWithTimeout");
  } catch (const Refused &) {
    destroy(stream);
    throw;
  }
  give_stream(stream);
}

std::uint64_t Transfers::start(const std::shared_ptr<Channel> &channel, bool put,
                               const std::vector<hixl::TransferOpDesc> &descs) {
  const StreamPtr stream = take_stream();
  try {
    enqueue_batches(*channel, put, descs, stream);
  } catch (const Refused &) {
    destroy(stream);
    throw;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::uint64_t number = next_++;
  requests_[number] = {channel, stream};
  return number;
}

hixl::TransferStatus Transfers::ask(std::uint64_t number) {
  Request request;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = requests_.find(number);
    if (found == requests_.end()) {
      throw Refused(29, static_cast<int>(hixl::kParamInvalid),
                    "request " + std::to_string(number) + " is unknown, or its end was reported already");
    }
    request = found->second;
  }
  bool complete = false;
  const int code = query(request.stream, &complete);
  if (code == kAclOk && !complete) return hixl::TransferStatus::WAITING;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    requests_.erase(number);
  }
  if (code == kAclOk) {
    give_stream(request.stream);
    return hixl::TransferStatus::COMPLETED;
  }
  destroy(request.stream);
  request.channel->unavailable = true;
  check_acl(code, "the transfer's stream");
  return hixl::TransferStatus::FAILED;
}

void Transfers::drop(Channel &channel) {
  std::vector<StreamPtr> streams;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto request = requests_.begin(); request != requests_.end();) {
      const bool ours = request->second.channel.get() == &channel;
      if (ours) streams.push_back(request->second.stream);
      request = ours ? requests_.erase(request) : std::next(request);
    }
  }
  for (const StreamPtr &stream : streams) destroy(stream);
}

}  // namespace cann_sim::hixl_sim
