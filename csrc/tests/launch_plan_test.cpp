// Launch plans: every element once, in launches that fit, whatever the sizes.
#include "core/launch_plan.h"

#include <set>

#include "tests/check.h"

using samk::Launch;
using samk::LaunchPlan;

namespace {

// Goes through the chunks by number, as a kernel does, and counts the elements of every tensor.
void covers_once(const std::vector<int64_t>& numel, int32_t capacity) {
  const LaunchPlan plan(numel.data(), static_cast<int64_t>(numel.size()));
  std::vector<int64_t> covered(numel.size(), 0);
  std::set<int32_t> seen;
  int64_t chunks = 0;
  for (const Launch& launch : plan.launches(capacity)) {
    const int32_t count = static_cast<int32_t>(launch.tensor.size());
    CHECK(count >= 1 && count <= capacity);
    CHECK(launch.first_chunk == chunks);
    CHECK(launch.first_full.front() == 0 && launch.first_full.size() == launch.tensor.size() + 1);
    for (int32_t k = 0; k < count; ++k) {
      const int32_t t = launch.tensor[k];
      CHECK(seen.insert(t).second);
      CHECK(launch.tail[k] < plan.chunk());
      if (k > 0) CHECK(launch.tail[k] <= launch.tail[k - 1]);
      covered[t] += (launch.first_full[k + 1] - launch.first_full[k]) * plan.chunk() + launch.tail[k];
    }
    chunks += launch.chunks();
  }
  CHECK(chunks == plan.chunks());
  CHECK(seen.size() == numel.size());
  for (size_t t = 0; t < numel.size(); ++t) CHECK(covered[t] == numel[t]);
}

}  // namespace

int main() {
  covers_once({}, 10);
  covers_once({0}, 10);
  covers_once({0, 1, 0, 2047, 2048, 2049, 4096, 0}, 3);
  covers_once(std::vector<int64_t>(10000, 64), 580);
  covers_once({int64_t{5} << 31, 7, int64_t{1} << 31}, 1);

  Random random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<int64_t> numel(random.bits() % 50);
    for (int64_t& n : numel) n = static_cast<int64_t>(random.bits() % (int64_t{1} << (random.bits() % 28)));
    covers_once(numel, 1 + static_cast<int32_t>(random.bits() % 20));
  }

  // The chunk is the largest power of two within the bounds that gives as many chunks as are wanted.
  for (int64_t total : {int64_t{1}, int64_t{4} << 20, int64_t{25600000}, int64_t{1} << 33}) {
    const int64_t chunk = LaunchPlan(&total, 1).chunk();
    CHECK(chunk >= SAMK_CHUNK_LEAST && chunk <= SAMK_CHUNK_MOST && (chunk & (chunk - 1)) == 0);
    CHECK(chunk == SAMK_CHUNK_LEAST || total / chunk >= SAMK_CHUNKS);
    CHECK(chunk == SAMK_CHUNK_MOST || total / (2 * chunk) < SAMK_CHUNKS);
  }
  const int64_t resnet = 25557032;
  if (SAMK_CHUNKS == 1024) CHECK(LaunchPlan(&resnet, 1).chunk() == std::min(16384, SAMK_CHUNK_MOST));
  return finish("launch_plan_test");
}
