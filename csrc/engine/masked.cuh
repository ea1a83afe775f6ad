// Loops under masks: which elements of a pack are selected, and no access where a whole word selects nothing.
// See note: [masks] in sam_kernels.h. Chunks begin with a word (launch_plan.h), and a pack lies inside one.
#ifndef SAM_KERNELS_ENGINE_MASKED_CUH_
#define SAM_KERNELS_ENGINE_MASKED_CUH_

#include "core/mask.h"
#include "engine/cuda.cuh"

namespace samk {

// What a pack knows of its word: the elements that are selected, and whether any is in the whole word. One
// register instead of two.
struct Word {
  unsigned bits;
  __device__ __forceinline__ bool is_empty() const { return bits == 0; }
  __device__ __forceinline__ bool has(int k) const { return (bits >> k & 1u) != 0; }
};

// The same where all elements are: nothing of it is left in the kernel.
struct Everything {
  __device__ __forceinline__ bool is_empty() const { return false; }
  __device__ __forceinline__ bool has(int) const { return true; }
};

// The words of one chunk. A tensor without words in a launch with masks has all bits set.
struct Mask {
  const uint64_t* words;
  uint64_t flip;  // all ones where bits that are clear select
};

struct NoMask {};

template <bool kHasMasks>
using MaskOf = std::conditional_t<kHasMasks, Mask, NoMask>;

// Packs that a thread reads before it writes or adds one. Under a mask a load is a branch, all of whose
// registers are taken at once, so there it reads no more than memory needs beside four blocks.
template <class M, int kUnroll, int kPackBytes>
constexpr int kUnrollOf = std::is_same<M, NoMask>::value || kUnroll == 1
                              ? kUnroll
                              : (kBytesInFlight + kBlocksPerSm * kThreads * kPackBytes - 1) /
                                    (kBlocksPerSm * kThreads * kPackBytes);

template <class M, int kLists>
__device__ __forceinline__ M find_mask(const Tensors<kLists>& tensors, int list, const Chunk& chunk) {
  if constexpr (std::is_same<M, Mask>::value) {
    const uint64_t* words = static_cast<const uint64_t*>(tensors.data[list][chunk.tensor]);
    return {words == nullptr ? nullptr : words + chunk.begin / kWordBits, 0};
  } else {
    return {};
  }
}

// Reads the words of a thread's packs. Its packs are whole rounds of the block apart, and a round is whole
// words, so all of them lie at the same place in their words.
template <int kStride>
class WordReader {
 public:
  __device__ __forceinline__ WordReader(const Mask& mask, int i)
      : mask_(mask), at_(i / kWordBits), first_(i % kWordBits) {
    static_assert(kStride % kWordBits == 0, "a round must be whole words");
  }
  // Of the pack that is so many rounds ahead.
  __device__ __forceinline__ uint64_t read(int round) const {
    const uint64_t* words = mask_.words;
    return (words == nullptr ? ~uint64_t{0} : __ldg(words + at_ + round * (kStride / kWordBits))) ^
           mask_.flip;
  }
  // A pack has at most 16 elements, so the bits beyond are free to say that there are others.
  __device__ __forceinline__ Word of_pack(uint64_t word) const {
    return {(static_cast<unsigned>(word >> first_) & 0xffffu) | (word != 0 ? 0x10000u : 0u)};
  }
  __device__ __forceinline__ void advance(int rounds) { at_ += rounds * (kStride / kWordBits); }

 private:
  Mask mask_;
  int at_, first_;
};

// As sweep_packs: finish(i, word, load(i, word, access), access). Words are read one turn ahead of what they
// decide on, so that a turn waits for memory once and not twice. Whatever a branch may skip must have a value
// before it (x{} in the loads): without one it would hold its registers from the start of the kernel, and
// spill.
template <int kUnroll, class Load, class Finish, class A>
__device__ __forceinline__ void sweep_words(int first, int end, const Mask& mask, const Load& load,
                                            const Finish& finish, A access) {
  constexpr int kStride = kThreads * A::kWidth;
  constexpr int kLast = (kUnroll - 1) * kStride;
  int i = first + static_cast<int>(threadIdx.x) * A::kWidth;
  WordReader<kStride> words(mask, i);
  uint64_t ahead[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) ahead[u] = i + kLast < end ? words.read(u) : 0;
#pragma unroll 1
  for (; i + kLast < end; i += kUnroll * kStride) {
    Word word[kUnroll];
    decltype(load(0, Word{}, access)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) word[u] = words.of_pack(ahead[u]);
    words.advance(kUnroll);
    const bool has_next = i + kUnroll * kStride + kLast < end;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) ahead[u] = has_next ? words.read(u) : 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(i + u * kStride, word[u], access);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) finish(i + u * kStride, word[u], loaded[u], access);
  }
#pragma unroll 1
  for (; i < end; i += kStride) {
    const Word word = words.of_pack(words.read(0));
    finish(i, word, load(i, word, access), access);
    words.advance(1);
  }
}

// As sweep, with a mask or without.
template <int kWidth, int kUnroll, class Load, class Finish>
__device__ __forceinline__ void sweep(int n, bool is_aligned, const Mask& mask, const Load& load,
                                      const Finish& finish) {
  const int whole = is_aligned ? n / kWidth * kWidth : 0;
  sweep_words<kUnroll>(0, whole, mask, load, finish, Access<kWidth, true>{});
  sweep_words<4>(whole, n, mask, load, finish, Access<1, true>{});
}
template <int kWidth, int kUnroll, class Load, class Finish>
__device__ __forceinline__ void sweep(int n, bool is_aligned, NoMask, const Load& load,
                                      const Finish& finish) {
  sweep<kWidth, kUnroll>(
      n, is_aligned, [&](int i, auto access) { return load(i, Everything{}, access); },
      [&](int i, const auto& x, auto access) { finish(i, Everything{}, x, access); });
}

// As sweep_in_order, with a mask or without.
template <int kWidth, int kUnroll, class Load, class Add>
__device__ __forceinline__ void sweep_in_order(int n, bool is_aligned, const Mask& mask, const Load& load,
                                               const Add& add) {
  const int whole = n / kWidth * kWidth;
  if (is_aligned) {
    sweep_words<kUnroll>(0, whole, mask, load, add, Access<kWidth, true>{});
  } else {
    sweep_words<kUnroll>(0, whole, mask, load, add, Access<kWidth, false>{});
  }
  sweep_words<1>(whole, n, mask, load, add, Access<1, true>{});
}
template <int kWidth, int kUnroll, class Load, class Add>
__device__ __forceinline__ void sweep_in_order(int n, bool is_aligned, NoMask, const Load& load,
                                               const Add& add) {
  sweep_in_order<kWidth, kUnroll>(
      n, is_aligned, [&](int i, auto access) { return load(i, Everything{}, access); },
      [&](int i, const auto& x, auto access) { add(i, Everything{}, x, access); });
}

// Copies the words that are not 0.
template <Reader kReader, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int n, const Mask& mask) {
  sweep<pack_width<T>(), SAMK_COPY_LOADS>(
      n, are_aligned(to, from), mask,
      [&](int i, auto word, auto access) {
        Raw<T, decltype(access)::kWidth> x{};
        if (!word.is_empty()) x = access.get(from + i);
        return x;
      },
      [&](int i, auto word, const auto& x, auto access) {
        if (!word.is_empty()) access.template put<kReader>(to + i, x);
      });
}
template <Reader kReader, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int n, NoMask) {
  copy_chunk<kReader>(to, from, n);
}

}  // namespace samk

#endif  // SAM_KERNELS_ENGINE_MASKED_CUH_
