// Tensor sizes -> launches of a device with many cores. Plain C++, no SAM, no device: pure and unit-tested.
#ifndef SAM_KERNELS_CORE_LAUNCH_PLAN_H_
#define SAM_KERNELS_CORE_LAUNCH_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <vector>

#include "core/tuning.h"

namespace samk {

// note: [launch order]
// Every tensor is cut into whole chunks and one tail shorter than a chunk (possibly empty). A launch numbers
// the whole chunks of all its tensors first, tensor by tensor, and then the tails, longest first, so that
// blocks that take every n-th chunk end at nearly the same time. Tail k belongs to the k-th tensor of the
// launch, so only the whole chunks need a prefix sum, and nothing is stored per chunk.
struct Launch {
  std::vector<int32_t> tensor;      // which tensors, longest tail first
  std::vector<int32_t> first_full;  // [tensors + 1] prefix sum of whole chunks
  std::vector<uint16_t> tail;       // elements after the whole chunks, less than a chunk
  int32_t first_chunk = 0;          // number of this launch's first chunk among those of all launches
  int32_t chunks() const { return first_full.back() + static_cast<int32_t>(tensor.size()); }
};

class LaunchPlan {
 public:
  LaunchPlan(const int64_t* numel, int64_t count) : numel_(numel, numel + count) {
    const int64_t total = std::accumulate(numel_.begin(), numel_.end(), int64_t{0});
    while (chunk_ < SAMK_CHUNK_MOST && chunk_ * 2 * SAMK_CHUNKS <= total) chunk_ *= 2;
    for (int64_t n : numel_) chunks_ += n / chunk_ + 1;
  }

  int64_t count() const { return static_cast<int64_t>(numel_.size()); }
  int64_t numel(int64_t t) const { return numel_[t]; }
  int64_t chunk() const { return chunk_; }
  // How many chunks all launches have together, however they are split.
  int64_t chunks() const { return chunks_; }

  // The launches of a pass whose kernel takes this many tensors at once; worked out once for each number.
  const std::vector<Launch>& launches(int32_t capacity) const {
    auto [found, is_new] = launches_.try_emplace(capacity);
    if (is_new) found->second = split(capacity);
    return found->second;
  }

 private:
  std::vector<Launch> split(int32_t capacity) const {
    std::vector<Launch> launches;
    int32_t first_chunk = 0;
    for (int64_t begin = 0; begin < count(); begin += capacity) {
      Launch launch;
      launch.tensor.resize(std::min<int64_t>(capacity, count() - begin));
      std::iota(launch.tensor.begin(), launch.tensor.end(), static_cast<int32_t>(begin));
      std::stable_sort(launch.tensor.begin(), launch.tensor.end(),
                       [&](int32_t a, int32_t b) { return numel_[a] % chunk_ > numel_[b] % chunk_; });
      launch.first_full.push_back(0);
      for (int32_t t : launch.tensor) {
        launch.first_full.push_back(launch.first_full.back() + static_cast<int32_t>(numel_[t] / chunk_));
        launch.tail.push_back(static_cast<uint16_t>(numel_[t] % chunk_));
      }
      launch.first_chunk = first_chunk;
      first_chunk += launch.chunks();
      launches.push_back(std::move(launch));
    }
    return launches;
  }

  std::vector<int64_t> numel_;
  int64_t chunk_ = SAMK_CHUNK_LEAST;
  int64_t chunks_ = 0;
  mutable std::map<int32_t, std::vector<Launch>> launches_;
};

}  // namespace samk

#endif  // SAM_KERNELS_CORE_LAUNCH_PLAN_H_
