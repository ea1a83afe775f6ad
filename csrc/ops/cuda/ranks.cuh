// What count and mark share: ranks of packs, and which elements take part. See note: [ranks].
#ifndef SAM_KERNELS_OPS_CUDA_RANKS_CUH_
#define SAM_KERNELS_OPS_CUDA_RANKS_CUH_

#include "engine/launch.cuh"
#include "engine/masked.cuh"
#include "math/random.h"
#include "math/rank.h"

namespace samk {
namespace ranks {

// Numbers and positions are whole numbers in the place of addresses: they travel like any other list.
enum List { kScores, kNumber, kWithin, kMasks, kPosition, kLists };

struct Scalars {
  uint64_t seed;
  uint64_t flip;  // all ones where elements take part whose bit in `within` is clear
  uint32_t step;
};

template <int kPack>
struct Ranks {
  int32_t v[kPack];
};

// Ranks of scores.
template <class T>
class OfScores {
 public:
  static constexpr int kWidth = pack_width<T>();
  template <int kLists>
  __device__ __forceinline__ OfScores(const Scalars&, const Tensors<kLists>& tensors, const Chunk& chunk)
      : scores_(element<const T>(tensors, kScores, chunk)) {}
  __device__ __forceinline__ bool is_aligned() const { return are_aligned(scores_); }
  template <class A>
  __device__ __forceinline__ Raw<T, A::kWidth> load(int i, Word word, A access) const {
    Raw<T, A::kWidth> x{};
    if (!word.is_empty() && scores_ != nullptr) x = access.get(scores_ + i);
    return x;
  }
  template <int kPack>
  __device__ __forceinline__ Ranks<kPack> rank(int, const Raw<T, kPack>& x) const {
    Ranks<kPack> ranks;
#pragma unroll
    for (int k = 0; k < kPack; ++k) ranks.v[k] = rank_of(static_cast<float>(widen(x.v[k]).x));
    return ranks;
  }

 private:
  const T* scores_;  // NULL where all are 0
};

// Ranks of random numbers: nothing is read, and four neighbours are one call.
class OfRandom {
 public:
  static constexpr int kWidth = 4;
  template <int kLists>
  __device__ __forceinline__ OfRandom(const Scalars& scalars, const Tensors<kLists>& tensors,
                                      const Chunk& chunk)
      : seed_(scalars.seed),
        step_(scalars.step),
        number_(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(tensors.data[kNumber][chunk.tensor]))),
        begin_(chunk.begin) {}
  __device__ __forceinline__ bool is_aligned() const { return true; }
  template <class A>
  __device__ __forceinline__ Raw<char, A::kWidth> load(int, Word, A) const {
    return {};
  }
  template <int kPack>
  __device__ __forceinline__ Ranks<kPack> rank(int i, const Raw<char, kPack>&) const {
    static_assert(kPack == 1 || kPack == 4, "see note: [four neighbours]");
    if constexpr (kPack == 1) {
      return {{rank_of_word(random_word(seed_, step_, number_, begin_ + i))}};
    } else {
      const Words x = random_words(seed_, step_, number_, begin_ + i);
      return {{rank_of_word(x.x0), rank_of_word(x.x1), rank_of_word(x.x2), rank_of_word(x.x3)}};
    }
  }

 private:
  uint64_t seed_;
  uint32_t step_, number_;
  int64_t begin_;
};

// The elements that take part. A tensor without words has all bits set.
template <int kLists>
__device__ __forceinline__ Mask find_part(const Scalars& scalars, const Tensors<kLists>& tensors,
                                          const Chunk& chunk) {
  Mask part = find_mask<Mask>(tensors, kWithin, chunk);
  part.flip = scalars.flip;
  return part;
}

inline Scalars scalars_of(const samk_ranks& ranks) {
  const bool flips = ranks.within.data != nullptr && ranks.outside != 0;
  return {ranks.seed, flips ? ~uint64_t{0} : 0, ranks.step};
}

inline void* as_address(uint64_t number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number)); }

inline void* pointer_of(const samk_ranks& ranks, const samk_list& masks, int list, int32_t t) {
  switch (list) {
    case kScores:
      return ranks.is_random ? nullptr : at(ranks.scores, t);
    case kNumber:
      return ranks.is_random ? as_address(ranks.number[t]) : nullptr;
    case kWithin:
      return at(ranks.within, t);
    default:
      return at(masks, t);
  }
}

template <class T>
struct Type {
  using type = T;
};

// Calls visit with the type that works out these ranks.
template <class Visit>
int with_ranks(const char* pass, const samk_ranks& ranks, Visit visit) {
  if (ranks.is_random) {
    if (ranks.number == nullptr)
      return fail(std::string(pass) + ": random ranks need the number of every tensor");
    return visit(Type<OfRandom>{});
  }
  return with_dtype(pass, ranks.scores.dtype,
                    [&](auto score) { return visit(Type<OfScores<decltype(score)>>{}); });
}

}  // namespace ranks
}  // namespace samk

#endif  // SAM_KERNELS_OPS_CUDA_RANKS_CUH_
