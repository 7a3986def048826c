#include "ascend/streams.h"

#include "ascend/errors.h"

namespace kvlink::ascend {
namespace {

Failure acl_failure(const AclApi &acl, const char *call, aclError code, const char *what) {
  return vendor_failure(&acl, Vendor::kAcl, call, code, "%s", what);
}

}  // namespace

StreamPool::~StreamPool() {
  for (const Lane &lane : idle_) {
    static_cast<void>(acl_.aclrtDestroyEvent(lane.event));
    static_cast<void>(acl_.aclrtDestroyStream(lane.stream));
  }
}

Failure StreamPool::acquire(Lane *lane) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      *lane = idle_.back();
      idle_.pop_back();
      ++in_use_;
      return {};
    }
    if (in_use_ >= most_) {
      return make_failure(KVL_AGAIN, "submit", "%u streams are in use, the most this engine takes", in_use_);
    }
    ++in_use_;
  }
  Lane made;
  const char *call = "aclrtCreateStream";
  aclError code = acl_.aclrtCreateStream(&made.stream);
  if (code == ACL_SUCCESS) {
    call = "aclrtSetStreamFailureMode";
    code = acl_.aclrtSetStreamFailureMode(made.stream, kStopOnFailure);
  }
  if (code == ACL_SUCCESS) {
    call = "aclrtCreateEventExWithFlag";
    code = acl_.aclrtCreateEventExWithFlag(&made.event, kEventSync);
  }
  if (code == ACL_SUCCESS) {
    *lane = made;
    return {};
  }
  const Failure failure = acl_failure(acl_, call, code, "no stream for a transfer");
  if (made.stream != nullptr) static_cast<void>(acl_.aclrtDestroyStream(made.stream));
  const std::lock_guard<std::mutex> lock(mutex_);
  --in_use_;
  return failure;
}

void StreamPool::release(const Lane &lane) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(lane);
  --in_use_;
}

Failure StreamPool::discard(const Lane &lane) {
  if (acl_.aclrtStreamAbort != nullptr) static_cast<void>(acl_.aclrtStreamAbort(lane.stream));
  // A plain destroy waits for the work on the stream, which may never end.
  const bool force = acl_.aclrtDestroyStreamForce != nullptr;
  const aclError code = force ? acl_.aclrtDestroyStreamForce(lane.stream) : acl_.aclrtDestroyStream(lane.stream);
  static_cast<void>(acl_.aclrtDestroyEvent(lane.event));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    --in_use_;
  }
  if (code == ACL_SUCCESS) return {};
  return acl_failure(acl_, force ? "aclrtDestroyStreamForce" : "aclrtDestroyStream", code,
                     "the stream of a failed transfer cannot be destroyed");
}

uint32_t StreamPool::in_use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

Failure record(const AclApi &acl, const Lane &lane) {
  const aclError code = acl.aclrtRecordEvent(lane.event, lane.stream);
  if (code == ACL_SUCCESS) return {};
  return acl_failure(acl, "aclrtRecordEvent", code, "the end of a transfer cannot be marked");
}

Failure query(const AclApi &acl, const Lane &lane, bool *complete) {
  aclrtEventRecordedStatus status = ACL_EVENT_RECORDED_STATUS_NOT_READY;
  const aclError code = acl.aclrtQueryEventStatus(lane.event, &status);
  *complete = code == ACL_SUCCESS && status == ACL_EVENT_RECORDED_STATUS_COMPLETE;
  if (code == ACL_SUCCESS) return {};
  return acl_failure(acl, "aclrtQueryEventStatus", code, "the transfer failed");
}

Failure drained(const AclApi &acl, const Lane &lane, uint32_t timeout_ms) {
  const auto wait_ms = static_cast<int32_t>(timeout_ms == 0 ? 1 : timeout_ms);  // 0 is undocumented, -1 is for ever
  const aclError code = acl.aclrtSynchronizeStreamWithTimeout(lane.stream, wait_ms);
  if (code == ACL_SUCCESS) return {};
  return acl_failure(acl, "aclrtSynchronizeStreamWithTimeout", code, "the transfer failed");
}

Failure record_caller(const AclApi &acl, aclrtStream caller, aclrtEvent *event) {
  aclrtEvent made = nullptr;
  aclError code = acl.aclrtCreateEventExWithFlag(&made, kEventSync);
  if (code != ACL_SUCCESS)
    return acl_failure(acl, "aclrtCreateEventExWithFlag", code, "no event for the caller's stream");
  code = acl.aclrtRecordEvent(made, caller);
  if (code != ACL_SUCCESS) {
    const Failure failure = acl_failure(acl, "aclrtRecordEvent", code, "the caller's stream cannot be waited for");
    static_cast<void>(acl.aclrtDestroyEvent(made));
    return failure;
  }
  *event = made;
  return {};
}

}  // namespace kvlink::ascend
