// Status codes of HIXL's rules, and how it turns HCCL's and ACL's codes into its own (rule 27).
#pragma once

#include <string>

#include "call.h"
#include "hccl_refused.h"
#include "hixl_abi.h"

namespace cann_sim::hixl_sim {

using hccl::Refused;

// HCCL 1 -> 103900, 9 -> 103901, 5 -> 103905, everything else 503900.
hixl::Status from_hccl(int code);
// 507046 -> 103901; every other ACL code is passed through unchanged.
hixl::Status from_acl(int code);

inline void check_hccl(int code, const std::string &what) {
  if (code != HCCL_SUCCESS) {
    throw Refused(27, static_cast<int>(from_hccl(code)),
                  what + " failed: HCCL " + std::to_string(code) + ", " + take_error_text());
  }
}
inline void check_acl(int code, const std::string &what) {
  if (code != kAclOk) {
    throw Refused(27, static_cast<int>(from_acl(code)), what + " failed: ACL " + std::to_string(code));
  }
}

// Runs the body of a method; nothing leaves it but a status.
template <typename Body>
hixl::Status answered(Call &call, Body body) noexcept {
  try {
    body();
    return static_cast<hixl::Status>(call.done(0));
  } catch (const Refused &refused) {
    return static_cast<hixl::Status>(call.done(fail(refused.rule, refused.code, "%s", refused.what())));
  } catch (const std::exception &error) {
    return static_cast<hixl::Status>(call.done(fail(26, static_cast<int>(hixl::kFailed), "%s", error.what())));
  }
}

}  // namespace cann_sim::hixl_sim
