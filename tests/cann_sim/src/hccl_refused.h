// How one of HCCL's rules says no: the vendor's code, the rule (facts §7), and the text aclGetRecentErrMsg will give.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "call.h"
#include "hccl_abi.h"

namespace cann_sim::hccl {

// Thrown inside the library only; guarded() turns it into its code.
class Refused : public std::exception {
 public:
  Refused(int number, int result, std::string text) : rule(number), code(result), text_(std::move(text)) {}
  const char *what() const noexcept override { return text_.c_str(); }

  const int rule;
  const int code;

 private:
  std::string text_;
};

// Runs the body of a vendor function; nothing leaves it but a code.
template <typename Body>
HcclResult guarded(Call &call, Body body) noexcept {
  try {
    body();
    return static_cast<HcclResult>(call.done(HCCL_SUCCESS));
  } catch (const Refused &refused) {
    return static_cast<HcclResult>(call.done(fail(refused.rule, refused.code, "%s", refused.what())));
  } catch (const std::exception &error) {
    return static_cast<HcclResult>(call.done(fail(0, HCCL_E_INTERNAL, "%s", error.what())));
  }
}

#define HCCL_CALL(name)                                     \
  ::cann_sim::Call call(name, ::cann_sim::Needs::kNothing); \
  if (call.stop()) return static_cast<HcclResult>(call.code())

}  // namespace cann_sim::hccl
