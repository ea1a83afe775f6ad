// The ranks of a chunk a word at a time, and which elements take part; note: [ranks] in sam_kernels.h.
#ifndef SAM_KERNELS_OPS_CPU_RANKS_H_
#define SAM_KERNELS_OPS_CPU_RANKS_H_

#include "engine/cpu.h"
#include "math/random.h"
#include "math/rank.h"

namespace samk {
namespace SAMK_ISA {

// The ranks of the 64 elements of a word; those beyond the end of a tensor mean nothing.
struct alignas(64) WordOfRanks {
  int32_t rank[kWordBits];

  // Where rank >> shift is x, and where it is above.
  SAMK_INLINE uint64_t equal(int shift, int32_t x) const {
    uint64_t bits = 0;
    for (int i = 0; i < kWordBits; i += kLanes) bits |= uint64_t{bits_equal(rank + i, shift, x)} << i;
    return bits;
  }
  SAMK_INLINE uint64_t above(int shift, int32_t x) const {
    uint64_t bits = 0;
    for (int i = 0; i < kWordBits; i += kLanes) bits |= uint64_t{bits_above(rank + i, shift, x)} << i;
    return bits;
  }
};

// Where one chunk has its ranks from. The kind is looked at once for 64 elements, so it need not be a type.
class ChunkRanks {
 public:
  ChunkRanks(const samk_ranks& ranks, const Chunk& chunk)
      : ranks_(ranks),
        chunk_(chunk),
        number_(ranks.is_random ? ranks.number[chunk.tensor] : 0),
        has_scores_(!ranks.is_random && has(ranks.scores, chunk.tensor)),
        within_(words_of(ranks.within, chunk)) {}

  // Bits of the elements of word k that take part.
  uint64_t part(int64_t k) const {
    const uint64_t present = low_bits(chunk_.size - k * kWordBits);
    if (ranks_.within.data == nullptr) return present;
    const uint64_t inside = within_ == nullptr ? ~uint64_t{0} : within_[k];
    return (ranks_.outside ? ~inside : inside) & present;
  }

  void read(int64_t k, WordOfRanks* to) const {
    const int64_t i = k * kWordBits;
    if (ranks_.is_random) return read_random(i, to);
    if (!has_scores_) return std::memset(to, 0, sizeof *to), void();
    switch (ranks_.scores.dtype) {
      case SAMK_F64:
        return read_scores<double>(i, to);
      case SAMK_BF16:
        return read_scores<bf16>(i, to);
      case SAMK_F16:
        return read_scores<f16>(i, to);
      default:
        return read_scores<float>(i, to);
    }
  }

 private:
  template <class T>
  void read_scores(int64_t i, WordOfRanks* to) const {
    const T* from = element<T>(ranks_.scores, chunk_.tensor, chunk_.begin + i);
    alignas(64) float scores[kWordBits] = {};
    sweep(std::min<int64_t>(kWordBits, chunk_.size - i),
          [&](int64_t at, auto part) { store(scores + at, to_f32(part.get(from + at))); });
    for (int at = 0; at < kWordBits; ++at) to->rank[at] = rank_of(scores[at]);
  }

  // note: [four neighbours] in random.h
  void read_random(int64_t i, WordOfRanks* to) const {
    constexpr int kCalls = kWordBits / 4;
    const uint64_t first = static_cast<uint64_t>(chunk_.begin + i) / 4;
    const auto seed_low = static_cast<uint32_t>(ranks_.seed);
    const auto seed_high = static_cast<uint32_t>(ranks_.seed >> 32);
    for (int call = 0; call < kCalls; ++call) {
      const uint64_t four = first + call;
      const Words words = philox(static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32), number_,
                                 ranks_.step, seed_low, seed_high);
      to->rank[4 * call] = rank_of_word(words.x0);
      to->rank[4 * call + 1] = rank_of_word(words.x1);
      to->rank[4 * call + 2] = rank_of_word(words.x2);
      to->rank[4 * call + 3] = rank_of_word(words.x3);
    }
  }

  const samk_ranks& ranks_;
  const Chunk& chunk_;
  const uint32_t number_;
  const bool has_scores_;
  const uint64_t* const within_;
};

inline int check_ranks(const char* pass, const samk_ranks& ranks) {
  if (ranks.is_random && ranks.number == nullptr) {
    return fail(std::string(pass) + ": random ranks need the number of every tensor");
  }
  return ranks.is_random ? 0 : with_dtype(pass, ranks.scores.dtype, [](auto) { return 0; });
}

}  // namespace SAMK_ISA
}  // namespace samk

#endif  // SAM_KERNELS_OPS_CPU_RANKS_H_
