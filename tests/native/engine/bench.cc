// Prints what the engine itself costs: submits of 1 and 8,192 ranges, and round trips without and with a later poll.
#include <algorithm>

#include "harness.h"

namespace {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <typename Body>
double median_us(int repeats, Body body) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    body();
    times.push_back(ms_since(start) * 1e3);
  }
  return median(times);
}

}  // namespace

TEST(submit_cost) {
  Fixture f;
  f.control.record = false;
  f.control.discard = true;
  std::vector<std::vector<char>> memory(60, std::vector<char>(1 << 20));
  std::vector<uint32_t> mems, rmems;
  for (auto &bytes : memory) {
    mems.push_back(f.open_mem(bytes));
    rmems.push_back(Fixture::open_rmem(f.peer, bytes));
  }
  const auto cost = [&](const char *what, const std::vector<kvl_range> &ranges) {
    const double us = median_us(2001, [&] { kve_transfer_release(f.submit(ranges)); });
    std::printf("%-58s %8.2f us\n", what, us);
  };
  std::vector<kvl_range> one, gaps, adjacent, layers;
  one.push_back({mems[0], rmems[0], 0, 0, 64});
  for (uint64_t i = 0; i < 8192; ++i) {
    gaps.push_back({mems[0], rmems[0], i * 128, i * 128, 64});
    adjacent.push_back({mems[0], rmems[0], i * 128, i * 128, 128});
    layers.push_back({mems[i % 60], rmems[i % 60], i * 128, i * 128, 64});
  }
  cost("submit and release, 1 range, inline", one);
  cost("submit and release, 8192 ranges with gaps, one region", gaps);
  cost("submit and release, 8192 ranges that merge into one", adjacent);
  cost("submit and release, 8192 ranges alternating 60 regions", layers);
}

TEST(round_trip) {
  Fixture f;
  f.control.record = false;
  const std::vector<kvl_range> one = {f.range(0, 0, 64)};
  std::printf("%-58s %8.2f us\n", "submit, wait, result, release: inline",
              median_us(20001, [&] { finish(f.submit(one)); }));
  f.control.submit = Submit::kLater;
  std::printf("%-58s %8.2f us\n", "submit, wait, result, release: completed by a poll",
              median_us(20001, [&] { finish(f.submit(one)); }));
}
