// Device addresses, rank tables, link types and options: pure decisions, each against the vendor's rules.
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "ascend/address.h"
#include "ascend/link_type.h"
#include "ascend/options.h"
#include "ascend/rank_table.h"
#include "host/socket.h"
#include "native/host/harness.h"

using namespace kvlink::ascend;

namespace {

bool says(const Failure &failure, const char *text) { return failure.message.find(text) != std::string::npos; }

void test_address_parsing() {
  const std::string conf =
      "address_0=192.168.1.10\nnetmask_0=255.255.255.0\n address_10=192.168.1.99 "
      "\nIPv6address_2=fd00::2\naddress_3=bad\n";
  CHECK(address_in_hccn_conf(conf, 0) == "192.168.1.10");
  CHECK(address_in_hccn_conf(conf, 1).empty());
  CHECK(address_in_hccn_conf(conf, 10) == "192.168.1.99");
  CHECK(address_in_hccn_conf(conf, 2) == "fd00::2");
  CHECK(address_in_hccn_conf(conf, 3).empty());
  CHECK(address_in_tool_output("ipaddr:10.1.2.3\nnetmask:255.255.255.0\n") == "10.1.2.3");
  CHECK(address_in_tool_output("no such device\n").empty());
}

void test_address_search() {
  char folder[] = "/tmp/kvlink-address-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  const std::string root = folder;
  setenv("KVLINK_ASCEND_SYSROOT", folder, 1);
  CHECK(find_device_address(3, "10.0.0.9", 1000).ip == "10.0.0.9");
  DeviceAddress none = find_device_address(3, "", 1000);
  CHECK(none.ip.empty());
  const Failure missing = missing_device_address(none, 3, "link_connect");
  CHECK(missing.status == KVL_UNAVAILABLE && says(missing, "hccn.conf") && says(missing, "device_ip"));
  // The tool answers where the file does not.
  CHECK(std::system(("mkdir -p " + root + "/etc " + root + "/usr/local/Ascend/driver/tools").c_str()) == 0);
  const std::string tool = root + "/usr/local/Ascend/driver/tools/hccn_tool";
  std::ofstream(tool) << "#!/bin/sh\n[ \"$1 $3 $4\" = '-i -ip -g' ] || exit 1\necho ipaddr:10.7.0.$2\n";
  chmod(tool.c_str(), 0755);
  const DeviceAddress told = find_device_address(3, "", 5000);
  CHECK(told.ip == "10.7.0.3" && told.source == tool);
  std::ofstream(root + "/etc/hccn.conf") << "address_3=10.8.0.3\n";
  CHECK(find_device_address(3, "", 1000).ip == "10.8.0.3");
  CHECK(find_device_address(-1, "", 1000).ip.empty());
  // One that hangs is killed at the deadline.
  std::ofstream(tool) << "#!/bin/sh\nexec sleep 60\n";
  const uint64_t before = kvlink::host::now_ns();
  CHECK(find_device_address(4, "", 300).ip.empty());
  CHECK(kvlink::host::now_ns() - before < uint64_t{5} * 1000000000);
  CHECK(std::system(("rm -rf " + root).c_str()) == 0);
  unsetenv("KVLINK_ASCEND_SYSROOT");
}

void test_rank_table_v1() {
  const Rank ranks[2] = {{"10.0.0.1", "10.0.0.1", 0, "192.168.1.10", 16666, -1, -1},
                         {"10.0.0.2", "", 3, "192.168.1.23", 0, -1, -1}};
  std::string json;
  CHECK(make_rank_table(RankTableVersion::k1_0, ranks, &json).ok());
  CHECK(json == R"({"status":"completed","version":"1.0","server_count":"2","server_list":[)"
                R"({"server_id":"10.0.0.1","host_ip":"10.0.0.1","device":[)"
                R"({"device_id":"0","device_ip":"192.168.1.10","device_port":"16666","rank_id":"0"}]},)"
                R"({"server_id":"10.0.0.2","device":[{"device_id":"3","device_ip":"192.168.1.23","rank_id":"1"}]}]})");
  const Rank same[2] = {{"node", "", 1, "", 0, -1, -1}, {"node", "", 2, "", 0, -1, -1}};
  CHECK(make_rank_table(RankTableVersion::k1_0, same, &json).ok());
  CHECK(json ==
        R"({"status":"completed","version":"1.0","server_count":"1","server_list":[{"server_id":"node","device":[)"
        R"({"device_id":"1","rank_id":"0"},{"device_id":"2","rank_id":"1"}]}]})");
}

void test_rank_table_v12() {
  Rank ranks[2] = {{"a", "", 0, "10.0.0.1", 0, 12, 0}, {"b\"\\\n", "", 3, "10.0.0.2", 0, 13, 0}};
  std::string json;
  CHECK(make_rank_table(RankTableVersion::k1_2, ranks, &json).ok());
  CHECK(json.find(R"("super_device_id":"12")") != std::string::npos);
  CHECK(
      json.find(
          R"("super_pod_list":[{"super_pod_id":"0","server_list":[{"server_id":"a"},{"server_id":"b\"\\\u000a"}]}])") !=
      std::string::npos);
  ranks[1].super_pod_id = 7;
  CHECK(make_rank_table(RankTableVersion::k1_2, ranks, &json).ok());
  CHECK(json.find(R"({"super_pod_id":"7","server_list":[{"server_id":"b\"\\\u000a"}]})") != std::string::npos);
}

void test_rank_table_rules() {
  const Rank good[2] = {{"a", "", 0, "10.0.0.1", 0, 1, 0}, {"b", "", 0, "10.0.0.2", 0, 2, 0}};
  std::string json;
  const auto refused = [&](const char *text, auto change) {
    Rank ranks[2] = {good[0], good[1]};
    change(ranks);
    const Failure failure = make_rank_table(RankTableVersion::k1_2, ranks, &json);
    CHECK(failure.status == KVL_INVALID);
    CHECK(says(failure, text));
  };
  refused("server_id", [](Rank *r) { r[0].server_id = ""; });
  refused("server_id", [](Rank *r) { r[1].server_id = std::string(65, 'x'); });
  refused("device id", [](Rank *r) { r[0].device_id = -1; });
  refused("device_ip", [](Rank *r) { r[0].device_ip = "10.0.0"; });
  refused("device_ip", [](Rank *r) { r[0].device_ip = r[1].device_ip; });
  refused("two different NPUs", [](Rank *r) { r[0].server_id = r[1].server_id; });
  refused("super_device_id", [](Rank *r) { r[1].super_device_id = -1; });
}

void environment(const char *roce, const char *pcie) {
  unsetenv("HCCL_INTRA_ROCE_ENABLE");
  unsetenv("HCCL_INTRA_PCIE_ENABLE");
  if (roce != nullptr) setenv("HCCL_INTRA_ROCE_ENABLE", roce, 1);
  if (pcie != nullptr) setenv("HCCL_INTRA_PCIE_ENABLE", pcie, 1);
}

void test_link_environment() {
  const struct {
    const char *roce, *pcie;
    bool ok, intra_roce;
  } cases[] = {{nullptr, nullptr, true, false}, {"1", nullptr, true, true},   {nullptr, "1", true, false},
               {"0", "1", true, false},         {"1", "0", true, true},       {"0", "0", true, false},
               {"0", nullptr, false, false},    {nullptr, "0", false, false}, {"1", "1", false, false},
               {"yes", nullptr, false, false}};
  for (const auto &item : cases) {
    environment(item.roce, item.pcie);
    LinkEnvironment link;
    CHECK_EQ(read_link_environment(&link).ok(), item.ok);
    if (item.ok) CHECK_EQ(link.intra_roce, item.intra_roce);
  }
  environment(nullptr, nullptr);
  CHECK(apply_link_option(LinkOption::kHccs).ok());
  CHECK(std::getenv("HCCL_INTRA_ROCE_ENABLE") == nullptr);
  CHECK(apply_link_option(LinkOption::kRoce).ok());
  CHECK(std::string(std::getenv("HCCL_INTRA_ROCE_ENABLE")) == "1");
  CHECK(apply_link_option(LinkOption::kHccs).status == KVL_INVALID);
  environment("0", "0");
  CHECK(apply_link_option(LinkOption::kRoce).status == KVL_INVALID);
  environment(nullptr, nullptr);
  for (const char *bad : {"119", "7201", "fast", "-1"}) {
    setenv("HCCL_CONNECT_TIMEOUT", bad, 1);
    CHECK(says(check_connect_timeout_environment(), "7200"));
  }
  setenv("HCCL_CONNECT_TIMEOUT", "120", 1);
  CHECK(check_connect_timeout_environment().ok());
  unsetenv("HCCL_CONNECT_TIMEOUT");
  CHECK(check_connect_timeout_environment().ok());
}

void test_link_agreement() {
  LinkSide a, b;
  a.soc = b.soc = SocFamily::kA2;
  a.server_id = b.server_id = "node";
  LinkType type;
  CHECK(agree_on_link(a, b, &type).ok() && type == LinkType::kHccs);
  b.server_id = "other";
  CHECK(agree_on_link(a, b, &type).ok() && type == LinkType::kRoce);
  a.option = LinkOption::kHccs;
  CHECK(says(agree_on_link(a, b, &type), "this side has option link: hccs"));
  CHECK(says(agree_on_link(b, a, &type), "the peer has option link: hccs"));
  a.option = LinkOption::kAuto;
  b.server_id = "node";
  b.intra_roce = true;
  CHECK(says(agree_on_link(a, b, &type), "HCCL_INTRA_ROCE_ENABLE"));
  // Different environments with the same effect are no contradiction: between servers RoCE is used anyway.
  b.server_id = "other";
  CHECK(agree_on_link(a, b, &type).ok() && type == LinkType::kRoce);
  a.soc = SocFamily::kA3;
  CHECK(says(agree_on_link(a, b, &type), "SoC"));
  b.soc = SocFamily::kA3;
  b.intra_roce = false;
  a.super_pod_id = b.super_pod_id = 4;
  CHECK(agree_on_link(a, b, &type).ok() && type == LinkType::kHccs);
  b.super_pod_id = 5;
  CHECK(agree_on_link(a, b, &type).ok() && type == LinkType::kRoce);
}

Failure parse(const std::vector<std::pair<const char *, const char *>> &options, CommonOptions *common) {
  std::vector<kvl_option> list;
  for (const auto &item : options) list.push_back({item.first, item.second});
  kvl_engine_params params{};
  params.struct_size = sizeof params;
  params.option_count = static_cast<uint32_t>(list.size());
  params.options = list.data();
  OptionTable table;
  common->declare(&table);
  const Failure failure = table.parse(params);
  return failure.ok() ? common->complete() : failure;
}

void test_options() {
  CommonOptions good;
  CHECK(parse({{"link", "hccs"}, {"bind_host", "[::1]"}, {"host_staging", "67108864"}}, &good).ok());
  CHECK(good.link_option() == LinkOption::kHccs);
  CHECK(good.bind_host == "::1" && good.advertise_host == "::1" && good.server_id == "::1");
  CHECK_EQ(good.host_staging, uint64_t{67108864});
  const struct {
    const char *name, *value, *text;
  } bad[] = {{"lnk", "roce", "did you mean 'link'"},
             {"link", "ib", "auto, roce or hccs"},
             {"max_in_flight", "0", "from 1 to 4096"},
             {"max_in_flight", "1 ", "from 1 to 4096"},
             {"max_in_flight", "99999999999999999999", "from 1 to 4096"},
             {"device_ip", "npu0", "IPv4 or IPv6"},
             {"host_staging", "4096", "at least"},
             {"bind_host", "", "expected 1 to 255"},
             {nullptr, "x", "null"}};
  for (const auto &item : bad) {
    CommonOptions options;
    const Failure failure = parse({{item.name, item.value}}, &options);
    CHECK(failure.status == KVL_INVALID);
    CHECK(says(failure, item.text));
  }
}

void test_device_names() {
  int32_t device = -1;
  CHECK(parse_device("npu:7", &device).ok() && device == 7);
  CHECK(parse_device("npu", &device).ok() && device == 0);
  for (const char *bad : {"cpu", "npu:", "npu:x", "npu:1x", "npu:99999", ""}) {
    CHECK(says(parse_device(bad, &device), "npu:N"));
  }
  CHECK(parse_device(nullptr, &device).status == KVL_INVALID);
  CHECK(soc_family("Ascend910B4-1") == SocFamily::kA2);
  CHECK(soc_family("Ascend910_9382") == SocFamily::kA3);
  CHECK(soc_family("Ascend950PR") == SocFamily::k950);
  CHECK(soc_family("Ascend310P") == SocFamily::kOther);
}

}  // namespace

int main() {
  test_address_parsing();
  test_address_search();
  test_rank_table_v1();
  test_rank_table_v12();
  test_rank_table_rules();
  test_link_environment();
  test_link_agreement();
  test_options();
  test_device_names();
  std::puts("topology: passed");
  return 0;
}
