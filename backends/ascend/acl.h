// The ACL functions of this process, found at run time.
#ifndef KVLINK_ASCEND_ACL_H
#define KVLINK_ASCEND_ACL_H

#include "ascend/acl_types.h"
#include "ascend/library.h"

namespace kvlink::ascend {

// A function pointer for every line of the lists; optional ones may be null.
struct AclApi {
#define KVLINK_ACL(need, type, name, parameters) type(*name) parameters = nullptr;
#include "ascend/acl_functions.inc"
#undef KVLINK_ACL
#define KVLINK_RT(need, type, name, parameters) type(*name) parameters = nullptr;
#include "ascend/rt_functions.inc"
#undef KVLINK_RT
  Library library;  // libascendcl.so

  // The vendor's last message of this thread (reading clears it), one line, or empty.
  std::string recent_message() const;
};

// Loads libascendcl.so once a process; later calls give the same table or the same failure.
Failure load_acl(const AclApi **acl);

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_ACL_H
