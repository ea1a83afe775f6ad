// Loops of the CPU engine: whole packs, then the tail through the same functor. Knows no optimizer.
#ifndef SAM_KERNELS_ENGINE_CPU_H_
#define SAM_KERNELS_ENGINE_CPU_H_

#include <type_traits>

#include "core/mask.h"
#include "core/pack.h"
#include "core/runtime.h"

namespace samk {
namespace SAMK_ISA {

// Access to a whole pack.
struct Whole {
  static constexpr int lanes() { return kLanes; }
  template <class T>
  SAMK_INLINE auto get(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  SAMK_INLINE void put(T* p, V x, bool streaming = false) const {
    streaming ? stream(p, x) : store(p, x);
  }
  // Writes the lanes whose bit is set; the others keep their bits. Half types alone.
  template <class T, class V>
  SAMK_INLINE void put_where(T* p, uint32_t bits, V x) const {
    store_where(p, bits, x, x);
  }
  template <class T>
  SAMK_INLINE void copy(T* to, const T* from, bool streaming) const {
    copy16(to, from, streaming);
  }
};

// Access to fewer than sixteen elements: lanes beyond the end read as zero and are never written.
struct Tail {
  int n;
  int lanes() const { return n; }
  template <class T>
  SAMK_INLINE auto get(const T* p) const {
    alignas(64) T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(static_cast<const T*>(lanes));
  }
  template <class T, class V>
  SAMK_INLINE void put(T* p, V x, bool = false) const {
    alignas(64) T lanes[kLanes];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
  }
  template <class T, class V>
  SAMK_INLINE void put_where(T* p, uint32_t bits, V x) const {
    alignas(64) T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    store_where(lanes, bits, x, x);
    std::memcpy(p, lanes, n * sizeof(T));
  }
  template <class T>
  SAMK_INLINE void copy(T* to, const T* from, bool) const {
    std::memcpy(to, from, n * sizeof(T));
  }
};

// Calls body(i, part) for every pack of n elements and once more for the rest.
template <class Body>
SAMK_INLINE void sweep(int64_t n, Body body) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// The same with the choice of streaming stores outside the loop.
template <class Body>
SAMK_INLINE void sweep_streaming(int64_t n, bool streaming, Body body) {
  if (streaming) {
    sweep(n, [&](int64_t i, auto part) { body(i, part, std::true_type{}); });
  } else {
    sweep(n, [&](int64_t i, auto part) { body(i, part, std::false_type{}); });
  }
}

// Which words of a chunk are not 0, a bit for each.
class WordMap {
 public:
  WordMap(const uint64_t* words, int64_t elements) : count_(word_count(elements)), zeros_(count_) {
    int64_t k = 0;
    for (; k + 8 <= count_; k += 8) bits_[k / 64] |= uint64_t{nonzero8(words + k)} << k % 64;
    for (; k < count_; ++k) bits_[k / 64] |= uint64_t{words[k] != 0} << k % 64;
    for (uint64_t bits : bits_) {
      turns_ += __builtin_popcountll((bits ^ bits << 1) & ~uint64_t{1});
      zeros_ -= __builtin_popcountll(bits);
    }
  }

  int64_t count() const { return count_; }
  int64_t zeros() const { return zeros_; }
  SAMK_INLINE bool is_zero(int64_t k) const { return (bits_[k / 64] >> k % 64 & 1) == 0; }

  // Where the run of words ends that begins at word k, all of them 0 or none.
  SAMK_INLINE int64_t run_end(int64_t k) const {
    const uint64_t flip = is_zero(k) ? 0 : ~uint64_t{0};
    uint64_t others = (bits_[k / 64] ^ flip) >> k % 64 << k % 64;
    int64_t block = k / 64;
    while (others == 0 && ++block * 64 < count_) others = bits_[block] ^ flip;
    return others == 0 ? count_ : std::min<int64_t>(block * 64 + __builtin_ctzll(others), count_);
  }

  // Whether single words that are 0 lie among the others, as random masks have them. Runs of them are then
  // too short to be worth a branch that is guessed wrong every other time.
  bool is_scattered() const { return turns_ * 8 > count_; }

 private:
  static constexpr int64_t kMaxWords = ChunkPlan::kChunkSize / kWordBits;
  const int64_t count_;
  int64_t zeros_;
  int64_t turns_ = 0;
  uint64_t bits_[kMaxWords / 64] = {};
};

// Calls body(begin, size, is_zero) for every run of words that are 0, or are not, in a chunk of n elements.
template <class Body>
SAMK_INLINE void for_each_run(const WordMap& map, int64_t n, Body body) {
  for (int64_t k = 0, end; k < map.count(); k = end) {
    end = map.run_end(k);
    body(k * kWordBits, std::min(end * kWordBits, n) - k * kWordBits, map.is_zero(k));
  }
}

// note: [scattered words]
// Words that are 0 here and there among others save nothing: reading a random half of the words takes as long
// as reading all, and whoever reads snapshots would have to read the weights as well. So a block of 64 words
// in which they are scattered is perturbed, saved and restored as a whole. All that touch snapshots go by
// this.
constexpr int64_t kBlock = 64 * kWordBits;

// Calls body(begin, size, is_saved) for every run of elements under a mask that have snapshots, or have none.
template <class Body>
SAMK_INLINE void for_each_saved_run(const uint64_t* words, int64_t n, Body body) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    const WordMap map(words + first / kWordBits, size);
    if (map.is_scattered()) {
      body(first, size, true);
      continue;
    }
    for_each_run(map, size,
                 [&](int64_t begin, int64_t length, bool is_zero) { body(first + begin, length, !is_zero); });
  }
}

// Bits from element i on, i a multiple of sixteen, for the pack that begins there.
SAMK_INLINE uint32_t bits_at(const uint64_t* words, int64_t i) {
  return static_cast<uint32_t>(words[i / kWordBits] >> (i % kWordBits)) & 0xffffu;
}

// to = from, where there are snapshots. Without words all is copied.
template <class T>
void copy_words(T* to, const T* from, const uint64_t* words, int64_t n, bool streaming) {
  const auto copy = [&](int64_t begin, int64_t size) {
    sweep(size, [&](int64_t i, auto part) { part.copy(to + begin + i, from + begin + i, streaming); });
  };
  if (words == nullptr) return copy(0, n);
  for_each_saved_run(words, n, [&](int64_t begin, int64_t size, bool is_saved) {
    if (is_saved) copy(begin, size);
  });
}

// w = round(master).
template <class T>
void round_chunk(T* w, const float* master, int64_t n, bool streaming) {
  sweep_streaming(n, streaming,
                  [&](int64_t i, auto part, auto stream) { part.put(w + i, part.get(master + i), stream); });
}

// Calls body(i, k) for every element i of the n whose bit is set, the k-th of them.
template <class Body>
SAMK_INLINE void for_each_selected(const uint64_t* words, int64_t n, Body body) {
  int64_t k = 0;
  for (int64_t word = 0; word < word_count(n); ++word) {
    const uint64_t own = words[word] & low_bits(n - word * kWordBits);
    for (uint64_t left = own; left != 0; left &= left - 1) {
      body(word * kWordBits + __builtin_ctzll(left), k++);
    }
  }
}

// Selected elements to a compact snapshot and back, with every bit kept.
template <class T>
void save_selected(T* compact, const T* w, const uint64_t* words, int64_t n) {
  for_each_selected(words, n, [&](int64_t i, int64_t k) { compact[k] = w[i]; });
}
template <class T>
void restore_selected(T* w, const T* compact, const uint64_t* words, int64_t n) {
  for_each_selected(words, n, [&](int64_t i, int64_t k) { w[i] = compact[k]; });
}

// Streaming stores need aligned addresses; 64 bytes also keeps each store within a cache line.
template <class T>
bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

template <class T>
T* element(const samk_list& list, int32_t tensor, int64_t begin) {
  if (list.data == nullptr || list.data[tensor] == nullptr) return nullptr;
  return static_cast<T*>(list.data[tensor]) + begin;
}

// The words of a chunk, which begins with a word; nullptr where the tensor is dense.
inline const uint64_t* words_of(const samk_list& masks, const Chunk& chunk) {
  return element<const uint64_t>(masks, chunk.tensor, chunk.begin / kWordBits);
}

// Where the compact snapshot of a chunk begins; nullptr where the tensor has none, or a whole one.
template <class T>
T* compact_of(const samk_list& snapshots, const samk_list& offsets, const Chunk& chunk) {
  const auto* first = element<const int64_t>(offsets, chunk.tensor, chunk.begin / kWordBits);
  return first == nullptr ? nullptr : element<T>(snapshots, chunk.tensor, *first);
}

inline bool has(const samk_list& list, int32_t tensor) {
  return list.data != nullptr && list.data[tensor] != nullptr;
}

// Calls body(chunk, index) for every chunk of the plan, in parallel. A pass that reads what the pass
// before it read goes backward: what was read last is still in the cache.
template <class Body>
void for_each_chunk(const samk_plan& plan, Body body, Order order = Order::kForward) {
  const auto& chunks = plan.chunks.chunks();
  for_each_span(plan.chunks, order, [&](const Span& span) {
    if (order == Order::kForward) {
      for (int64_t c = span.first; c < span.last; ++c) body(chunks[c], c);
    } else {
      for (int64_t c = span.last; c-- > span.first;) body(chunks[c], c);
    }
    finish_streaming();
  });
}

// Calls visit with a value of the element type, or fails with a sentence.
template <class Visit>
int with_dtype(const char* pass, int32_t dtype, Visit visit) {
  switch (dtype) {
    case SAMK_F32:
      return visit(float{});
    case SAMK_F64:
      return visit(double{});
    case SAMK_BF16:
      return visit(bf16{});
    case SAMK_F16:
      return visit(f16{});
  }
  return fail(std::string(pass) + ": dtype code " + std::to_string(dtype) + " is unknown");
}

inline int64_t dtype_bytes(int32_t dtype) { return dtype == SAMK_F64 ? 8 : dtype == SAMK_F32 ? 4 : 2; }

// The lists of one pass share a dtype in this engine; absent lists do not count.
template <class... Lists>
int check_one_dtype(const char* pass, int32_t dtype, const Lists&... lists) {
  const bool same = ((lists.data == nullptr || lists.dtype == dtype) && ...);
  if (same) return 0;
  return fail(std::string(pass) + ": the lists differ in dtype, and the CPU engine expects one for all");
}

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// Masters are fp32 and beside half types.
inline int check_masters(const char* pass, int32_t dtype, const samk_list& masters) {
  const bool fits = masters.dtype == SAMK_F32 && (dtype == SAMK_BF16 || dtype == SAMK_F16);
  if (masters.data == nullptr || fits) return 0;
  return fail(std::string(pass) +
              ": masters are served in fp32 beside weights and gradients of one half type");
}

// The sum over lanes, low to high, in double.
template <class V>
SAMK_INLINE double sum_lanes(V x) {
  alignas(64) typename V::Scalar lanes[kLanes];
  store(lanes, x);
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

}  // namespace SAMK_ISA
}  // namespace samk

#endif  // SAM_KERNELS_ENGINE_CPU_H_
