// The catalogue: every code of the fact sheet has a name, a meaning and a fix, and messages carry them.
#include "ascend/errors.h"

#include <cstring>
#include <set>
#include <string>
#include <tuple>

#include "ascend/acl.h"
#include "ascend/hccl_types.h"
#include "native/host/harness.h"

using namespace kvlink::ascend;

namespace {

void test_every_entry_helps() {
  size_t count = 0;
  const CatalogueEntry *entries = catalogue(&count);
  CHECK(count > 90);
  std::set<std::tuple<Vendor, int64_t, std::string>> seen;
  for (size_t i = 0; i < count; ++i) {
    const CatalogueEntry &entry = entries[i];
    CHECK(seen.emplace(entry.vendor, entry.code, entry.call).second);
    CHECK(entry.name[0] != '\0' && entry.meaning[0] != '\0' && entry.fix[0] != '\0');
    CHECK(entry.status >= KVL_AGAIN && entry.status <= KVL_ENGINE_DOWN);
    // A completion has 200 characters for all of it, the prefix and the code included.
    CHECK(std::strlen(entry.meaning) + std::strlen(entry.fix) < 360);
    // A call's own entry stands beside the general one.
    if (entry.call[0] != '\0') CHECK(seen.count({entry.vendor, entry.code, ""}) == 1);
  }
  const TextEntry *texts = text_catalogue(&count);
  CHECK_EQ(count, size_t{19});
  for (size_t i = 0; i < count; ++i) CHECK(std::strncmp(texts[i].code, "EI00", 4) == 0);
}

void test_fact_sheet_is_covered() {
  for (int64_t code = HCCL_E_PARA; code <= HCCL_E_OOM; ++code) {
    CHECK(find_entry(Vendor::kHccl, code, "") != nullptr);
  }
  CHECK(find_entry(Vendor::kHccl, HCCL_E_IN_STATUS, "") != nullptr);
  for (const int64_t code : {103900, 103901, 103902, 103903, 103904, 103905, 203900, 503900}) {
    CHECK(find_entry(Vendor::kHixl, code, "") != nullptr);
  }
  for (const int64_t code :
       {100000, 100001, 100002, 100037, 100039, 107000, 107001, 107002, 107003, 107008, 107016, 107017,
        107019, 107020, 107022, 107023, 107024, 107033, 107041, 207000, 207001, 207003, 207004, 207005,
        207007, 207008, 207009, 207012, 207018, 207020, 500000, 500001, 500002, 500003, 500004, 500005,
        507000, 507010, 507013, 507014, 507015, 507017, 507018, 507022, 507046, 507047, 507048, 507049,
        507050, 507053, 507054, 507055, 507056, 507057, 507899, 507900, 507901, 507904, 507910, 507911}) {
    CHECK(find_entry(Vendor::kAcl, code, "") != nullptr);
  }
  CHECK(find_entry(Vendor::kHccl, 99, "") == nullptr);
}

void test_context_decides() {
  CHECK(find_entry(Vendor::kHccl, 1, "HcclRegisterGlobalMem") != find_entry(Vendor::kHccl, 1, "HcclCommBindMem"));
  CHECK(find_entry(Vendor::kHccl, 19, "HcclCommPrepare")->status == KVL_NO_RESOURCE);
  // HIXL hands ACL's codes on.
  CHECK(std::strcmp(find_entry(Vendor::kHixl, 507057, "TransferSync")->name, "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR") == 0);
  CHECK(hixl_recoverable(203900) && !hixl_recoverable(503900) && !hixl_recoverable(507899));
}

void test_messages() {
  const Failure failure = vendor_failure(nullptr, Vendor::kHccl, "HcclCommPrepare", 15, "linking with %s", "peer-1");
  CHECK(failure.site == "HcclCommPrepare");
  CHECK_EQ(failure.code, int64_t{15});
  CHECK(failure.status == KVL_INVALID);
  for (const char *part : {"linking with peer-1: 15 HCCL_E_RUNTIME", "2 MiB", "Fix: "}) {
    CHECK(failure.message.find(part) != std::string::npos);
  }
  const Failure unknown = vendor_failure(nullptr, Vendor::kAcl, "aclrtMalloc", 424242, "memory");
  CHECK(unknown.status == KVL_INTERNAL && unknown.message.find("424242") != std::string::npos);
}

// What the vendor says in its own words is more exact than its code.
void test_vendor_text() {
  static std::string said;
  AclApi acl;
  acl.aclGetRecentErrMsg = [] { return said.empty() ? nullptr : said.c_str(); };
  said = "EI0008: the two\n versions\tdiffer\n";
  const Failure failure = vendor_failure(&acl, Vendor::kHccl, "HcclCommPrepare", 9, "connect");
  CHECK(failure.message.find("install the same CANN on both") != std::string::npos);
  CHECK(failure.message.find("[EI0008: the two versions differ]") != std::string::npos);
  said.clear();
  CHECK(vendor_failure(&acl, Vendor::kHccl, "HcclCommPrepare", 9, "connect").message.find('[') == std::string::npos);
  CHECK(find_text_entry("no code EI0099 EI0020 here") == find_text_entry("EI0020"));
  CHECK(find_text_entry("EI0018") == nullptr);
}

void test_comm_config() {
  const HcclCommConfig config = make_comm_config("kvlink-0123");
  CHECK_EQ(config.size, size_t{300});
  CHECK_EQ(config.version, 5u);
  CHECK_EQ(config.magicWord, 0xf0f0f0f0u);
  CHECK(std::strcmp(config.hcclCommName, "kvlink-0123") == 0);
  CHECK_EQ(config.hcclRdmaTrafficClass, 0xffffffffu);
  CHECK_EQ(config.hcclUdi[0], '\0');
  CHECK_EQ(make_comm_config(std::string(300, 'n').c_str()).hcclCommName[127], '\0');
}

}  // namespace

int main() {
  test_every_entry_helps();
  test_fact_sheet_is_covered();
  test_context_decides();
  test_messages();
  test_vendor_text();
  test_comm_config();
  std::puts("errors: passed");
  return 0;
}
