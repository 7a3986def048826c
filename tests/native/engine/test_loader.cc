// Loading: what a provider library must be, and what is said when it is not.
#include "harness.h"

namespace {

void rejected(const std::string &path, kvl_status expected, const std::vector<const char *> &parts) {
  Error err;
  kve_provider *provider = nullptr;
  CHECK_EQ(kve_provider_load(path.c_str(), &provider, &err), expected);
  CHECK(provider == nullptr);
  for (const char *part : parts) CHECK_CONTAINS(err.message, part);
}

}  // namespace

TEST(gives_what_the_provider_says) {
  kve_provider *provider = load();
  CHECK_CONTAINS(kve_provider_name(provider), "fake");
  CHECK_CONTAINS(kve_provider_version(provider), "1.2.3");
  CHECK_EQ(kve_provider_wire_version(provider), 5);
  CHECK_EQ(kve_provider_path_count(provider), 3);
  CHECK_CONTAINS(kve_provider_path_name(provider, 2), "slow");
  CHECK_EQ(kve_provider_path_name(provider, 3)[0], '\0');
  Error err;
  CHECK_EQ(kve_provider_probe(provider, &err), KVL_OK);
  CHECK(load() == provider);  // loaded once
}

TEST(rejects_what_is_no_library) {
  rejected("/no/such/file.so", KVL_UNAVAILABLE, {"/no/such/file.so"});
  rejected("", KVL_INVALID, {"path"});
}

TEST(rejects_a_library_without_the_symbol) {
  rejected(fake_path("fake_no_symbol"), KVL_UNSUPPORTED, {"kvl_provider_init", "fake_no_symbol"});
}

TEST(rejects_another_abi) { rejected(fake_path("fake_wrong_abi"), KVL_UNSUPPORTED, {"ABI 7", "speaks 1"}); }

TEST(rejects_a_table_of_the_wrong_size) {
  rejected(fake_path("fake_too_large"), KVL_UNSUPPORTED, {"100000 bytes"});
  rejected(fake_path("fake_truncated"), KVL_UNSUPPORTED, {"8 bytes"});
}

TEST(names_a_missing_mandatory_function) {
  rejected(fake_path("fake_no_poll"), KVL_UNSUPPORTED, {"'nopoll'", "mandatory function poll"});
}

TEST(rejects_no_name_and_no_paths) {
  rejected(fake_path("fake_unnamed"), KVL_UNSUPPORTED, {"no provider name"});
  rejected(fake_path("fake_no_paths"), KVL_UNSUPPORTED, {"0 paths"});
}

TEST(passes_the_providers_own_refusal) { rejected(fake_path("fake_refuses"), KVL_UNSUPPORTED, {"No!"}); }

TEST(optional_functions_may_be_missing) {
  kve_provider *provider = load("fake_minimal");
  kve_channel_params params{};
  params.struct_size = sizeof params;
  params.default_timeout_ms = 1000;
  Error err;
  kve_channel *channel = nullptr;
  CHECK_EQ(kve_channel_open(provider, &params, &channel, &err), KVL_OK);
  uint64_t address = 0;
  CHECK_EQ(kve_mem_alloc(channel, 0, 4096, &address, &err), KVL_UNSUPPORTED);
  CHECK_CONTAINS(err.message, "minimal");
  kvl_stat stat{};
  uint32_t count = 1;
  CHECK_EQ(kve_channel_provider_stats(channel, &stat, &count, &err), KVL_UNSUPPORTED);
  kvl_link_params link = Fixture::link_params();
  kve_peer *peer = nullptr;
  CHECK_EQ(kve_peer_open(channel, &link, &peer, &err), KVL_OK);
  CHECK_EQ(kve_peer_connect(peer, "x", 1, 100, &err), KVL_OK);
  CHECK_EQ(kve_peer_check(peer, &err), KVL_OK);
  kve_peer_interrupt(peer);
  kve_transfer *transfer = nullptr;
  CHECK_EQ(kve_submit(peer, KVL_GET, nullptr, 0, 0, 0, 0, &transfer, &err), KVL_UNSUPPORTED);
  CHECK_CONTAINS(err.message, "no get");
  CHECK_EQ(kve_submit(peer, KVL_PUT, nullptr, 0, 0xabc, 0, 0, &transfer, &err), KVL_UNSUPPORTED);
  CHECK_CONTAINS(err.message, "0xabc");
  CHECK_EQ(kve_submit(peer, KVL_PUT, nullptr, 0, 0, 0, 0, &transfer, &err), KVL_OK);
  kve_transfer_release(transfer);
  kve_peer_release(peer);
  CHECK_EQ(kve_channel_close(channel, 1000, &err), KVL_OK);
  kve_channel_release(channel);
}

TEST(a_claimed_capability_needs_its_function) {
  kve_channel_params params{};
  params.struct_size = sizeof params;
  params.default_timeout_ms = 1000;
  Error err;
  kve_channel *channel = nullptr;
  CHECK_EQ(kve_channel_open(load("fake_liar"), &params, &channel, &err), KVL_INTERNAL);
  CHECK_CONTAINS(err.message, "cancel");
  CHECK(channel == nullptr);
  CHECK_EQ(fake("fake_liar").control->engine_closes, 1);
}

TEST(open_failures_carry_the_providers_words) {
  FakeControl &control = *fake().control;
  kve_channel_params params{};
  params.struct_size = sizeof params;
  params.default_timeout_ms = 1000;
  Error err;
  kve_channel *channel = nullptr;
  control.engine_open_status = KVL_UNAVAILABLE;
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_UNAVAILABLE);
  CHECK_CONTAINS(err.message, "scripted failure");
  CHECK_EQ(err.vendor_code, 4242);
  CHECK_EQ(kve_provider_probe(load(), &err), KVL_UNAVAILABLE);
  control.silent_failures = true;
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_UNAVAILABLE);
  CHECK_CONTAINS(err.message, "engine_open failed with UNAVAILABLE and gave no reason");
  control.engine_open_status = 99;  // no status of the contract
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_INTERNAL);
  CHECK_CONTAINS(err.message, "99");
  params.default_timeout_ms = 0;
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_INVALID);
  params.struct_size = 4;
  CHECK_EQ(kve_channel_open(load(), &params, &channel, &err), KVL_INVALID);
  CHECK_EQ(kve_channel_open(load(), nullptr, &channel, &err), KVL_INVALID);
  CHECK_EQ(kve_channel_open(nullptr, nullptr, nullptr, nullptr), KVL_INVALID);
}

TEST(one_provider_of_an_exclusion_group) {
  fake().control->grouped = true;
  fake("fake_other").control->grouped = true;
  kve_channel_params params{};
  params.struct_size = sizeof params;
  params.default_timeout_ms = 1000;
  Error err;
  kve_channel *first = nullptr, *second = nullptr, *other = nullptr;
  CHECK_EQ(kve_channel_open(load(), &params, &first, &err), KVL_OK);
  CHECK_EQ(kve_channel_open(load(), &params, &second, &err), KVL_OK);  // the same provider twice is fine
  CHECK_EQ(kve_channel_open(load("fake_other"), &params, &other, &err), KVL_BUSY);
  CHECK_CONTAINS(err.message, "'other'");
  CHECK_CONTAINS(err.message, "'fake'");
  CHECK_EQ(kve_channel_close(first, 1000, &err), KVL_OK);
  CHECK_EQ(kve_channel_open(load("fake_other"), &params, &other, &err), KVL_BUSY);
  CHECK_EQ(kve_channel_close(second, 1000, &err), KVL_OK);
  CHECK_EQ(kve_channel_open(load("fake_other"), &params, &other, &err), KVL_OK);
  CHECK_EQ(kve_channel_close(other, 1000, &err), KVL_OK);
  kve_channel_release(first);
  kve_channel_release(second);
  kve_channel_release(other);
}
