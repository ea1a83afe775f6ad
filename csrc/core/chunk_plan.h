// Tensor sizes -> chunks -> spans. Plain C++, no SAM, no threads: pure and unit-tested.
#ifndef SAM_KERNELS_CORE_CHUNK_PLAN_H_
#define SAM_KERNELS_CORE_CHUNK_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace samk {

// A piece of one tensor. Chunks are the unit of summation, so they depend on sizes alone.
struct Chunk {
  int32_t tensor;
  int64_t begin;
  int64_t size;
};

// Consecutive chunks that one thread takes at a time.
struct Span {
  int64_t first;
  int64_t last;
};

class ChunkPlan {
 public:
  // 64 KB of fp32: long enough to hide the cost per chunk, short enough that a span can balance.
  static constexpr int64_t kChunkSize = 16384;
  // A chunk costs about as much as this many elements, however few it has.
  static constexpr int64_t kChunkCost = 64;
  static constexpr int64_t kSpanCost = 1 << 18;

  ChunkPlan(const int64_t* numel, int64_t count) : numel_(numel, numel + count) {
    for (int64_t t = 0; t < count; ++t) {
      total_ += numel[t];
      for (int64_t begin = 0; begin < numel[t]; begin += kChunkSize) {
        chunks_.push_back({static_cast<int32_t>(t), begin, std::min(kChunkSize, numel[t] - begin)});
      }
    }
    // Small lists get smaller spans, so that every thread finds work.
    const int64_t cost = total_ + kChunkCost * static_cast<int64_t>(chunks_.size());
    const int64_t span_cost = std::clamp<int64_t>(cost / 16, kChunkSize, kSpanCost);
    int64_t first = 0, gathered = 0;
    for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); ++c) {
      gathered += chunks_[c].size + kChunkCost;
      if (gathered >= span_cost) {
        spans_.push_back({first, c + 1});
        first = c + 1;
        gathered = 0;
      }
    }
    if (first < static_cast<int64_t>(chunks_.size()))
      spans_.push_back({first, static_cast<int64_t>(chunks_.size())});
  }

  int64_t count() const { return static_cast<int64_t>(numel_.size()); }
  int64_t total() const { return total_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  const std::vector<Span>& spans() const { return spans_; }

 private:
  std::vector<int64_t> numel_;
  std::vector<Chunk> chunks_;
  std::vector<Span> spans_;
  int64_t total_ = 0;
};

}  // namespace samk

#endif  // SAM_KERNELS_CORE_CHUNK_PLAN_H_
