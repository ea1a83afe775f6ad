#include "math/perturb.h"

#include "engine/cpu.h"
#include "math/metric.h"
#include "math/random.h"
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

// w = round(math(master, g)), where the mask selects it; the master stays.
template <class T, class Math>
void perturb_master(T* w, const T* g, const float* master, const uint64_t* words, int64_t n, bool streaming,
                    const Math& math) {
  if (words == nullptr) {
    sweep_streaming(n, streaming, [&](int64_t i, auto part, auto stream) {
      part.put(w + i, math(part.get(master + i), part.get(g + i)), stream);
    });
    return;
  }
  for_each_run(WordMap(words, n), n, [&](int64_t begin, int64_t size, bool is_zero) {
    if (is_zero) return;
    sweep(size, [&](int64_t at, auto part) {
      const int64_t i = begin + at;
      part.put_where(w + i, bits_at(words, i), math(part.get(master + i), part.get(g + i)));
    });
  });
}

// Where the random bits of a chunk come from; note: [stochastic rounding].
struct Draw {
  bool is_wanted;
  uint64_t seed;
  uint32_t step, number;
  int64_t begin;  // of the chunk in its tensor

  // Those of the word of elements from `first` on. Loops over the calls are loops that compilers put into
  // vectors; one copy of them for all metrics and shapes, or compiling takes minutes.
  __attribute__((noinline)) void fill(int64_t first, uint32_t* bits) const {
    constexpr int kCalls = kWordBits / 8;
    uint32_t words[4][kCalls];
    for (int call = 0; call < kCalls; ++call) {
      const Words x = random_words_of_eight(seed, step, number, begin + first + 8 * call);
      words[0][call] = x.x0;
      words[1][call] = x.x1;
      words[2][call] = x.x2;
      words[3][call] = x.x3;
    }
    for (int call = 0; call < kCalls; ++call) {
      for (int k = 0; k < 4; ++k) {
        bits[8 * call + 2 * k] = words[k][call] & 0xffffu;
        bits[8 * call + 2 * k + 1] = words[k][call] >> 16;
      }
    }
  }
};

// w = moved, rounded at random, where the word selects it.
__attribute__((noinline)) void round_word(bf16* w, const float* moved, uint64_t word, const uint32_t* bits) {
  for (int i = 0; i < kWordBits; ++i) {
    if ((word >> i & 1) != 0) w[i] = to_bf16_at_random(moved[i], bits[i]);
  }
}

// The elements of one word, or fewer at the end, rounded at random.
template <class Math>
__attribute__((noinline)) void perturb_at_random(bf16* w, const bf16* g, bf16* snapshot, uint64_t word,
                                                 int64_t n, const Math& math, const uint32_t* bits) {
  alignas(64) bf16 ws[kWordBits] = {}, gs[kWordBits] = {};
  alignas(64) float moved[kWordBits];
  std::memcpy(ws, w, n * sizeof *ws);
  std::memcpy(gs, g, n * sizeof *gs);
  for (int i = 0; i < kWordBits; i += kLanes) {
    store(moved + i, math(load(static_cast<const bf16*>(ws) + i), load(static_cast<const bf16*>(gs) + i)));
  }
  std::memcpy(snapshot, ws, n * sizeof *ws);
  round_word(ws, moved, word, bits);
  std::memcpy(w, ws, n * sizeof *ws);
}

// A chunk, word by word, with whole snapshots or compact ones.
template <class Math>
void perturb_chunk_at_random(bf16* w, const bf16* g, bf16* snapshot, bf16* compact, const uint64_t* words,
                             int64_t n, const Math& math, const Draw& draw) {
  uint32_t bits[kWordBits];
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWordBits) {
      const uint64_t word = words == nullptr ? ~uint64_t{0} : words[i / kWordBits] & low_bits(n - i);
      draw.fill(i, bits);
      if (compact == nullptr) {
        perturb_at_random(w + i, g + i, snapshot + i, word, std::min<int64_t>(kWordBits, n - i), math, bits);
        continue;
      }
      if (word == 0) continue;
      bf16 saved[kWordBits];
      perturb_at_random(w + i, g + i, saved, word, std::min<int64_t>(kWordBits, n - i), math, bits);
      for_each_selected(&word, kWordBits, [&](int64_t at, int64_t) { *compact++ = saved[at]; });
    }
  };
  if (words == nullptr || compact != nullptr) return run(0, n);
  for_each_saved_run(words, n, [&](int64_t begin, int64_t size, bool is_saved) {
    if (is_saved) run(begin, begin + size);
  });
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
  const float* master;  // nullptr where there is none
  Draw draw;

  template <class Math>
  void perturb(const Math& math) const {
    if constexpr (is_half<T>) {
      if (master != nullptr) return perturb_master(w, g, master, words, n, streaming, math);
    }
    if constexpr (std::is_same<T, bf16>::value) {
      if (draw.is_wanted) return perturb_chunk_at_random(w, g, snapshot, compact, words, n, math, draw);
    }
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
  const bool has_masters = a.masters.data != nullptr;
  if (check_one_dtype("perturb_", a.params.dtype, a.grads) != 0) return 1;
  if (!has_masters && check_one_dtype("perturb_", a.params.dtype, a.snapshots) != 0) return 1;
  if (check_masters("perturb_", a.params.dtype, a.masters) != 0) return 1;
  if (a.number != nullptr && (has_masters || a.params.dtype != SAMK_BF16)) {
    return fail("perturb_: stochastic rounding is for bf16 weights without masters");
  }
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
          if (!has(a.grads, t) || !has(has_masters ? a.masters : a.snapshots, t)) return;
          if (row[SAMK_METRIC] == SAMK_FIXED) return;
          const float* master = element<const float>(a.masters, t, chunk.begin);
          T* w = element<T>(a.params, t, chunk.begin);
          const T* g = element<T>(a.grads, t, chunk.begin);
          T* s = has_masters ? nullptr : element<T>(a.snapshots, t, chunk.begin);
          // What was just read is in the cache; writing around it would only cost.
          const bool streaming = large && s != g && can_stream(has_masters ? w : s);
          const bool is_fisher = row[SAMK_METRIC] == SAMK_FISHER;
          const uint64_t* words = words_of(a.masks, chunk);
          T* compact = has_masters ? nullptr : compact_of<T>(a.snapshots, a.offsets, chunk);
          if (!is_safe || (is_fisher && a.shape != SAMK_LINEAR)) {
            if (has_masters) return;
            return compact != nullptr ? save_selected(compact, w, words, chunk.size)
                                      : copy_words(s, w, words, chunk.size, streaming);
          }
          const uint32_t number = a.number == nullptr ? 0 : a.number[t];
          const Draw draw{a.number != nullptr, a.seed, a.step, number, chunk.begin};
          const Site<T> at{w, g, s, compact, words, chunk.size, streaming, master, draw};
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
