#include "ops/cpu/passes.h"
#include "ops/cpu/ranks.h"

namespace samk {
namespace SAMK_ISA {
namespace {

constexpr int kMaxBits = 11;

// One span's counts, in the nearest cache. Neighbours count in different copies: where ranks are equal, an
// increment would wait for the one before it to be stored. A span is far below 2^32 elements.
class Histogram {
 public:
  explicit Histogram(const samk_count_args& a) : a_(a), last_((1u << a.bits) - 1) {
    for (auto& copy : copies_) std::memset(copy, 0, (last_ + size_t{1}) * sizeof copy[0]);
  }

  void add(const WordOfRanks& word, uint64_t part) {
    // Ranks have 31 bits; a shift by 32 would be undefined.
    uint64_t chosen = part & word.equal(std::min(a_.shift + a_.bits, 31), a_.prefix);
    if (chosen == ~uint64_t{0}) {
      for (int i = 0; i < kWordBits; ++i) add(word.rank[i], i);
      return;
    }
    for (; chosen != 0; chosen &= chosen - 1) {
      const int i = __builtin_ctzll(chosen);
      add(word.rank[i], i);
    }
  }

  // Whole numbers: the order of the spans changes nothing.
  void hand_over() const {
    for (uint32_t bin = 0; bin <= last_; ++bin) {
      int64_t sum = 0;
      for (const auto& copy : copies_) sum += copy[bin];
      if (sum != 0) __atomic_fetch_add(a_.counts + bin, sum, __ATOMIC_RELAXED);
    }
  }

 private:
  SAMK_INLINE void add(int32_t rank, int i) {
    ++copies_[i % kCopies][static_cast<uint32_t>(rank) >> a_.shift & last_];
  }

  static constexpr int kCopies = 4;
  const samk_count_args& a_;
  const uint32_t last_;
  uint32_t copies_[kCopies][1 << kMaxBits];
};

}  // namespace

int count(const samk_plan& plan, const samk_count_args& a) {
  if (a.bits < 0 || a.bits > kMaxBits) return fail("count_ranks: expected 0 to 11 bits");
  if (a.shift < 0 || a.shift > 31) return fail("count_ranks: expected a shift of 0 to 31");
  if (check_ranks("count_ranks", a.ranks) != 0) return 1;
  const auto& chunks = plan.chunks.chunks();
  for_each_span(plan.chunks, Order::kForward, [&](const Span& span) {
    Histogram histogram(a);
    for (int64_t c = span.first; c < span.last; ++c) {
      if (!has(a.masks, chunks[c].tensor)) continue;
      const ChunkRanks ranks(a.ranks, chunks[c]);
      const int64_t words = word_count(chunks[c].size);
      for (int64_t k = 0; k < words; ++k) {
        const uint64_t part = ranks.part(k);
        if (part == 0) continue;
        WordOfRanks word;
        ranks.read(k, &word);
        histogram.add(word, part);
      }
    }
    histogram.hand_over();
  });
  return 0;
}

}  // namespace SAMK_ISA
}  // namespace samk
