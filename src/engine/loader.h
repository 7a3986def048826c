// Loading a provider library and checking its function table.
#pragma once

#include <string>
#include <vector>

#include "kvlink/provider.h"

// A loaded provider. Never unloaded: threads of a vendor library may outlive every channel.
struct kve_provider {
  std::string path;
  std::string name;
  std::string version;
  std::vector<std::string> path_names;
  kvl_provider table{};      // optional slots that were NULL answer UNSUPPORTED
  uint64_t absent_caps = 0;  // capabilities whose slots the provider left NULL
};

namespace kvlink {

// Loads `path` once per process. Rejects what the contract forbids, naming it.
kvl_status load_provider(const char *path, kve_provider **provider, kvl_error *err);

// One provider of a non-empty exclusion group at a time in a process. BUSY names the one that holds it.
kvl_status claim_exclusion_group(const std::string &group, const std::string &provider, kvl_error *err);
void release_exclusion_group(const std::string &group) noexcept;

}  // namespace kvlink
