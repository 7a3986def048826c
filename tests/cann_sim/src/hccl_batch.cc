#include "hccl_batch.h"

#include <algorithm>
#include <sstream>

#include "hccl_comm.h"
#include "hccl_refused.h"
#include "sim.h"

namespace cann_sim::hccl {
namespace {

// What a batch was checked against, and what it holds until it has run.
struct Job {
  CommPtr comm;
  std::shared_ptr<Connection> connection;
  std::shared_ptr<const LocalRanges> locals;
  std::shared_ptr<const RemoteRegions> remotes;
  bool put = false;
};

struct Copy {
  void *local;
  const RemoteRegion *remote;
  std::uint64_t offset;
  std::uint64_t bytes;
};

// Keeps the communicator busy until the operation ran or was dropped with its stream.
class InFlight {
 public:
  explicit InFlight(CommPtr comm) : comm_(std::move(comm)) { ++comm_->in_flight; }
  ~InFlight() { --comm_->in_flight; }
  InFlight(const InFlight &) = delete;
  InFlight &operator=(const InFlight &) = delete;

 private:
  CommPtr comm_;
};

Job make_job(const CommPtr &comm, std::uint32_t peer) {
  const std::lock_guard<std::mutex> lock(comm->mutex);
  const auto found = comm->connections.find(peer);
  if (found == comm->connections.end()) return {};
  return {comm, found->second, comm->local, found->second->remote, false};
}

std::uint32_t batch_limit() { return settings().soc == Soc::k950 ? 64 : 256; }

std::uint64_t element_size(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    case HCCL_DATA_TYPE_RESERVED:
      break;
  }
  throw Refused(22, HCCL_E_PARA, "EI0003: data type " + std::to_string(static_cast<int>(type)));
}

// The one range of a sorted list that holds all of [start, +bytes), or null. Tries `hint` first.
template <typename Range>
const Range *holding(const std::vector<Range> &ranges, std::uint64_t start, std::uint64_t bytes, const Range *hint) {
  const auto holds = [&](const Range &range) {
    return range.start <= start && start <= range.end && bytes <= range.end - start;
  };
  if (hint != nullptr && holds(*hint)) return hint;
  auto after = std::upper_bound(ranges.begin(), ranges.end(), start,
                                [](std::uint64_t value, const Range &range) { return value < range.start; });
  if (after == ranges.begin() || !holds(*--after)) return nullptr;
  return &*after;
}

[[noreturn]] void refuse_range(const char *which, std::uint32_t index, std::uint64_t start, std::uint64_t bytes) {
  std::ostringstream text;
  text << "descriptor " << index << ": can't find " << which << " by key [0x" << std::hex << start << ", +0x" << bytes
       << ")";
  throw Refused(20, HCCL_E_INTERNAL, text.str());
}

struct Resolver {
  const LocalRanges &locals;
  const RemoteRegions &remotes;
  Link link;
  const LocalRange *last_local = nullptr;
  const RemoteRegion *last_remote = nullptr;

  Copy resolve(const HcclOneSideOpDesc &desc, std::uint32_t index) {
    std::uint64_t bytes = 0;
    if (__builtin_mul_overflow(desc.count, element_size(desc.dataType), &bytes)) {
      refuse_range("remoteBuffer", index, 0, desc.count);
    }
    if (bytes == 0) {
      if (link == Link::hccs) throw Refused(22, HCCL_E_PARA, "descriptor " + std::to_string(index) + " is empty");
      log_event("warning", "\"text\":\"descriptor of zero bytes\"");
    }
    const auto remote = reinterpret_cast<std::uint64_t>(desc.remoteAddr);
    const auto local = reinterpret_cast<std::uint64_t>(desc.localAddr);
    const RemoteRegion *to = holding(remotes, remote, bytes, last_remote);
    if (to == nullptr) refuse_range("remoteBuffer", index, remote, bytes);
    const LocalRange *from = holding(locals, local, bytes, last_local);
    if (from == nullptr) refuse_range("localBuffer", index, local, bytes);
    if (link == Link::hccs && family() == Family::a2 && from->type != HCCL_MEM_TYPE_DEVICE) {
      throw Refused(18, HCCL_E_RUNTIME, "rtMemcpyAsync failed: HCCS on A2 copies from device to device only");
    }
    last_remote = to;
    last_local = from;
    return {desc.localAddr, to, remote - to->start, bytes};
  }
};

// How a lost peer shows on the stream: RDMA retries for a while, the SDMA engine notices at once.
int lost(Connection &connection, Comm &comm, Running &running) {
  const int code = connection.link == Link::roce ? running.retry_window() : kRtSuspectRemote;
  connection.broken = true;
  comm.async_error = HCCL_E_REMOTE;
  return code;
}

int run_copies(const std::vector<Copy> &copies, Connection &connection, Comm &comm, bool put, Running &running) {
  if (connection.broken) {
    comm.async_error = HCCL_E_REMOTE;
    return kRtLinkError;  // the queue pair is in error since the first failure
  }
  if (connection.peer_lost()) return lost(connection, comm, running);
  for (const Copy &copy : copies) {
    if (copy.bytes == 0) continue;
    const RemoteResult result = put ? remote_write(copy.remote->memory, copy.offset, copy.local, copy.bytes)
                                    : remote_read(copy.remote->memory, copy.offset, copy.local, copy.bytes);
    if (result == RemoteResult::kGone) return lost(connection, comm, running);
    if (result == RemoteResult::kFault) {
      connection.broken = true;
      comm.async_error = HCCL_E_REMOTE;
      return kRtSuspectRemote;
    }
  }
  return kAclOk;
}

void enqueue_copies(const Job &job, const StreamPtr &stream, std::vector<Copy> copies) {
  if (copies.empty()) return;
  auto guard = std::make_shared<InFlight>(job.comm);
  Operation operation;
  operation.name = job.put ? "put" : "get";
  operation.run = [job, copies = std::move(copies), guard](Running &running) {
    return run_copies(copies, *job.connection, *job.comm, job.put, running);
  };
  const int code = enqueue(stream, std::move(operation));
  if (code != kAclOk) throw Refused(5, HCCL_E_RUNTIME, "the stream refused the work: rt " + std::to_string(code));
}

StreamPtr usable_stream(const Comm &comm, rtStream_t handle) {
  if (current_device() != comm.device) {
    throw Refused(4, HCCL_E_RUNTIME, "the communicator's device is not current in this thread (rt 107002)");
  }
  StreamPtr stream;
  const int code = find_stream(handle, false, true, &stream);
  if (code != kAclOk) {
    throw Refused(5, HCCL_E_RUNTIME, "the stream can't be used in this thread's context: rt " + std::to_string(code));
  }
  return stream;
}

}  // namespace

void batch(HcclComm handle, std::uint32_t peer, const HcclOneSideOpDesc *descs, std::uint32_t count, rtStream_t stream,
           bool put) {
  const Comm::Use comm(find_comm(handle));
  if (descs == nullptr || stream == nullptr) throw Refused(20, HCCL_E_PTR, "EI0003: a null argument");
  if (count > batch_limit()) {
    throw Refused(20, HCCL_E_PARA,
                  "EI0003: " + std::to_string(count) + " descriptors, at most " + std::to_string(batch_limit()));
  }
  if (peer >= comm->ranks() || peer == comm->rank) {
    throw Refused(20, HCCL_E_PARA,
                  "EI0003: remote rank " + std::to_string(peer) + " of " + std::to_string(comm->ranks()));
  }
  if (count == 0) {
    log_event("warning", "\"text\":\"a batch of no descriptors\"");
    return;
  }
  Job job = make_job(comm.shared(), peer);
  if (!job.connection) throw Refused(20, HCCL_E_NOT_FOUND, "no connection to rank " + std::to_string(peer));
  job.put = put;
  const StreamPtr target = usable_stream(*job.comm, stream);
  std::vector<Copy> copies;
  copies.reserve(count);
  Resolver resolver{*job.locals, *job.remotes, job.connection->link};
  try {
    for (std::uint32_t index = 0; index < count; ++index) copies.push_back(resolver.resolve(descs[index], index));
  } catch (const Refused &) {
    enqueue_copies(job, target, std::move(copies));  // what came before is on its way
    throw;
  }
  enqueue_copies(job, target, std::move(copies));
}

}  // namespace cann_sim::hccl
