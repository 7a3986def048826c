// The vendor's headers, as far as a header set has them.
#ifndef KVLINK_VENDOR_H
#define KVLINK_VENDOR_H

#include <cstddef>
#include <cstdint>

#if __has_include(<acl/acl.h>)
#include <acl/acl.h>
#endif
#if __has_include(<acl/error_codes/rt_error_codes.h>)
#include <acl/error_codes/rt_error_codes.h>
#endif
#if __has_include(<hccl/hccl.h>)
#include <hccl/hccl.h>
#endif
#if __has_include(<hccl/hccl_comm.h>)
#include <hccl/hccl_comm.h>
#endif
#if __has_include(<hccl/hccl_one_sided_services.h>)
#include <hccl/hccl_one_sided_services.h>
#elif __has_include(<legacy/hccl/hccl_one_sided_services.h>)
#include <legacy/hccl/hccl_one_sided_services.h>
#endif

#endif  // KVLINK_VENDOR_H
