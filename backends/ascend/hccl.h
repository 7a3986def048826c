// HCCL's one-sided functions, found at run time: in which library is a matter of the provider's policy.
#ifndef KVLINK_ASCEND_HCCL_H
#define KVLINK_ASCEND_HCCL_H

#include "ascend/hccl_types.h"
#include "ascend/library.h"

namespace kvlink::ascend {

// Which library must or may carry the functions (they moved from libhccl.so to libhcomm.so in CANN 8.5).
struct HcclPolicy {
  const char *provider;         // for messages
  const char *libraries[2];     // in this order; the second may be null
  bool allow_per_communicator;  // use the fallback flavour where HcclCommPrepare is missing
  const char *minimum;          // "8.3", for messages
};

extern const HcclPolicy kHcclPolicy;           // libhcomm.so, else libhccl.so; either flavour
extern const HcclPolicy kHcommOnesidedPolicy;  // libhcomm.so only; process-granular only

enum class HcclFlavour {
  kGlobal,          // register for the process, bind, prepare
  kPerCommunicator  // register with every communicator, exchange, enable
};

struct HcclApi {
#define KVLINK_HCCL(need, type, name, parameters) type(*name) parameters = nullptr;
#include "ascend/hccl_functions.inc"
#undef KVLINK_HCCL
  Library library;
  HcclFlavour flavour = HcclFlavour::kGlobal;
};

// Finds a library of the policy with every function of a flavour. UNAVAILABLE names what is missing in each.
Failure load_hccl(const HcclPolicy &policy, HcclApi *hccl);

constexpr uint32_t kHcclMaxBatch = 256;      // descriptors in one HcclBatchPut or HcclBatchGet
constexpr uint32_t kHcclMaxBatch950 = 64;    // on Ascend950
constexpr uint32_t kHcclMaxRegions8x = 256;  // registered, bound and remote regions before CANN 9.0
constexpr uint16_t kHcclDefaultPort = 16666;

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_HCCL_H
