#include "math/perturb.h"

#include "engine/cpu.h"
#include "math/metric.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

// A snapshot may be where the gradient is, so every pack of that is read before the same pack is saved.
template <class T, class Math>
void perturb_chunk(T* w, const T* g, T* snapshot, int64_t n, bool streaming, const Math& math) {
  sweep_streaming(n, streaming, [&](int64_t i, auto part, auto stream) {
    const auto old = part.get(w + i);
    const auto moved = math(old, part.get(g + i));
    // The bits, not the converted value: a snapshot keeps NaN payloads.
    if constexpr (sizeof(T) >= 4) {
      part.put(snapshot + i, old, stream);
    } else {
      part.copy(snapshot + i, w + i, stream);
    }
    part.put(w + i, moved);
  });
}

// The same for a word of a mask. All is read before the first write: with words passed over here and there,
// streaming stores among the reads made the pass up to a third slower.
template <class T, class Math, class Stream>
SAMK_INLINE void perturb_word(T* w, const T* g, T* snapshot, uint64_t word, const Math& math, Stream stream) {
  using V = typename Opmath<T>::V;
  constexpr int kPacks = kWordBits / kLanes;
  constexpr Whole part{};
  V old[kPacks], moved[kPacks];
#pragma GCC unroll 4
  for (int p = 0; p < kPacks; ++p) {
    old[p] = part.get(w + p * kLanes);
    moved[p] = math(old[p], part.get(g + p * kLanes));
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPacks; ++p) {
    const int i = p * kLanes;
    if constexpr (sizeof(T) >= 4) {
      part.put(snapshot + i, old[p], stream);
    } else {
      part.copy(snapshot + i, w + i, stream);
    }
    store_where(w + i, static_cast<uint32_t>(word >> i), moved[p], old[p]);
  }
}

// The last elements of a tensor, less than a word: as a word with nothing beyond them.
template <class T, class Math>
void perturb_rest(T* w, const T* g, T* snapshot, uint64_t word, int64_t n, const Math& math) {
  T ws[kWordBits] = {}, gs[kWordBits] = {}, snapshots[kWordBits];
  std::memcpy(ws, w, n * sizeof(T));
  std::memcpy(gs, g, n * sizeof(T));
  perturb_word(ws, gs, snapshots, word, math, std::false_type{});
  std::memcpy(snapshot, snapshots, n * sizeof(T));
  std::memcpy(w, ws, n * sizeof(T));
}

// A chunk under a mask; what has no snapshot is passed over.
template <class T, class Math, class Stream>
void perturb_words(T* w, const T* g, T* snapshot, const uint64_t* words, int64_t n, const Math& math,
                   Stream stream) {
  for_each_saved_run(words, n, [&](int64_t begin, int64_t size, bool is_saved) {
    if (!is_saved) return;
    const int64_t end = begin + size;
    int64_t i = begin;
    for (; i + kWordBits <= end; i += kWordBits) {
      perturb_word(w + i, g + i, snapshot + i, words[i / kWordBits], math, stream);
    }
    if (i < end) perturb_rest(w + i, g + i, snapshot + i, words[i / kWordBits], end - i, math);
  });
}

// The same with a compact snapshot: word by word, selected elements are copied on from a whole one of that
// word.
template <class T, class Math>
void perturb_compact(T* w, const T* g, T* compact, const uint64_t* words, int64_t n, const Math& math) {
  alignas(64) T snapshot[kWordBits];
  for (int64_t i = 0; i < n; i += kWordBits) {
    const uint64_t word = words[i / kWordBits] & low_bits(n - i);
    if (word == 0) continue;
    if (n - i < kWordBits) {
      perturb_rest(w + i, g + i, snapshot, word, n - i, math);
    } else {
      perturb_word(w + i, g + i, snapshot, word, math, std::false_type{});
    }
    for_each_selected(&word, kWordBits, [&](int64_t at, int64_t) { *compact++ = snapshot[at]; });
  }
}

// What a chunk is perturbed with, whatever the metric and the shape.
template <class T>
struct Site {
  T* w;
  const T* g;
  T* snapshot;
  T* compact;             // nullptr where the snapshot is whole
  const uint64_t* words;  // nullptr where the tensor is dense
  int64_t n;
  bool streaming;

  template <class Math>
  void perturb(const Math& math) const {
    if (words == nullptr) {
      perturb_chunk(w, g, snapshot, n, streaming, math);
    } else if (compact != nullptr) {
      perturb_compact(w, g, compact, words, n, math);
    } else if (streaming) {
      perturb_words(w, g, snapshot, words, n, math, std::true_type{});
    } else {
      perturb_words(w, g, snapshot, words, n, math, std::false_type{});
    }
  }
};

template <class T, class Metric>
void perturb_shaped(const samk_perturb_args& a, const Site<T>& at, typename Opmath<T>::S c,
                    const Metric& metric) {
  using S = typename Opmath<T>::S;
  switch (a.shape) {
    case SAMK_SIGN:
      return at.perturb(Perturb<S, Metric, Sign>{c, metric, {}});
    case SAMK_POWERED: {
      const Powered<S> shape{static_cast<S>(*a.peak), static_cast<S>(a.q - 1)};
      return at.perturb(Perturb<S, Metric, Powered<S>>{c, metric, shape});
    }
    default:
      return at.perturb(Perturb<S, Metric, Linear>{c, metric, {}});
  }
}

}  // namespace

int perturb(const samk_plan& plan, const samk_perturb_args& a) {
  if (a.masters.data != nullptr) return fail("perturb_: the CPU engine does not serve fp32 masters");
  if (check_one_dtype("perturb_", a.params.dtype, a.grads, a.snapshots) != 0) return 1;
  const bool is_safe = std::isfinite(*a.norm);
  const bool large = exceeds_cache(plan.chunks.total() * dtype_bytes(a.params.dtype) * 3);
  return with_dtype("perturb_", a.params.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename Opmath<T>::S;
    for_each_chunk(
        plan,
        [&](const Chunk& chunk, int64_t) {
          const int32_t t = chunk.tensor;
          const double* row = a.table + a.row[t] * SAMK_COLUMNS;
          if (!has(a.grads, t) || !has(a.snapshots, t) || row[SAMK_METRIC] == SAMK_FIXED) return;
          T* w = element<T>(a.params, t, chunk.begin);
          const T* g = element<T>(a.grads, t, chunk.begin);
          T* s = element<T>(a.snapshots, t, chunk.begin);
          // What was just read is in the cache; writing around it would only cost.
          const bool streaming = large && s != g && can_stream(s);
          const bool is_fisher = row[SAMK_METRIC] == SAMK_FISHER;
          const uint64_t* words = words_of(a.masks, chunk);
          T* compact = compact_of<T>(a.snapshots, a.offsets, chunk);
          if (!is_safe || (is_fisher && a.shape != SAMK_LINEAR)) {
            return compact != nullptr ? save_selected(compact, w, words, chunk.size)
                                      : copy_words(s, w, words, chunk.size, streaming);
          }
          const Site<T> at{w, g, s, compact, words, chunk.size, streaming};
          const double own = a.tensor_scale == nullptr ? 1.0 : a.tensor_scale[t];
          const S scale = perturb_scale<S>(row, a.shape, *a.norm, own);
          if (is_fisher) {
            const Fisher<S> metric{static_cast<S>(row[SAMK_ETA])};
            at.perturb(Perturb<S, Fisher<S>, Linear>{scale, metric, {}});
          } else if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
            const Adaptive<S> metric{static_cast<S>(row[SAMK_ETA])};
            perturb_shaped(a, at, scale, metric);
          } else {
            perturb_shaped(a, at, scale, Euclidean{});
          }
        },
        Order::kBackward);
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
