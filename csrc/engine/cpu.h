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
  template <class T, class V>
  SAMK_INLINE void put_where(T* p, uint32_t bits, V x) const {
    store_where(p, bits, x);
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
    store_where(lanes, bits, x);
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

// Where the run of words ends that begins at element i, and whether these words are 0.
SAMK_INLINE int64_t run_end(const uint64_t* words, int64_t i, int64_t n, bool* is_zero) {
  const int64_t count = word_count(n);
  int64_t k = i / kWordBits;
  *is_zero = words[k] == 0;
  if (*is_zero) {
    while (k + 4 <= count && (words[k] | words[k + 1] | words[k + 2] | words[k + 3]) == 0) k += 4;
    while (k < count && words[k] == 0) ++k;
  } else {
    while (k < count && words[k] != 0) ++k;
  }
  return std::min(k * kWordBits, n);
}

// Calls body(begin, size, is_zero) for every run of words that are 0, or are not, in the n elements under a
// mask. Without a mask all is one run that is not.
template <class Body>
SAMK_INLINE void for_each_run(const uint64_t* words, int64_t n, Body body) {
  for (int64_t i = 0; i < n;) {
    bool is_zero = false;
    const int64_t end = words == nullptr ? n : run_end(words, i, n, &is_zero);
    body(i, end - i, is_zero);
    i = end;
  }
}

// Bits from element i on, i a multiple of sixteen, for the pack that begins there.
SAMK_INLINE uint32_t bits_at(const uint64_t* words, int64_t i) {
  return static_cast<uint32_t>(words[i / kWordBits] >> (i % kWordBits)) & 0xffffu;
}

// to = from, except in words that are 0.
template <class T>
void copy_words(T* to, const T* from, const uint64_t* words, int64_t n, bool streaming) {
  for_each_run(words, n, [&](int64_t begin, int64_t size, bool is_zero) {
    if (is_zero) return;
    sweep(size, [&](int64_t i, auto part) { part.copy(to + begin + i, from + begin + i, streaming); });
  });
}

// Calls body(i, k) for every element i of the n whose bit is set, the k-th of them.
template <class Body>
SAMK_INLINE void for_each_selected(const uint64_t* words, int64_t n, Body body) {
  int64_t k = 0;
  for (int64_t word = 0; word < word_count(n); ++word) {
    for (uint64_t left = words[word]; left != 0; left &= left - 1) {
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
