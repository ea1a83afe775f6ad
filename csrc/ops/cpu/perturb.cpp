#include "math/perturb.h"

#include "engine/cpu.h"
#include "math/metric.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

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

// The same under a mask, where words that are 0 are passed over.
template <class T, class Math>
void perturb_words(T* w, const T* g, T* snapshot, const uint64_t* words, int64_t n, bool streaming,
                   const Math& math) {
  for_each_run(words, n, [&](int64_t begin, int64_t size, bool is_zero) {
    if (is_zero) return;
    sweep_streaming(size, streaming, [&](int64_t offset, auto part, auto stream) {
      const int64_t i = begin + offset;
      const auto old = part.get(w + i);
      const auto moved = math(old, part.get(g + i));
      if constexpr (sizeof(T) >= 4) {
        part.put(snapshot + i, old, stream);
      } else {
        part.copy(snapshot + i, w + i, stream);
      }
      part.put_where(w + i, bits_at(words, i), moved);
    });
  });
}

// The same where the snapshot has been taken.
template <class T, class Math>
void move_words(T* w, const T* g, const uint64_t* words, int64_t n, const Math& math) {
  for_each_run(words, n, [&](int64_t begin, int64_t size, bool is_zero) {
    if (is_zero) return;
    sweep(size, [&](int64_t offset, auto part) {
      const int64_t i = begin + offset;
      part.put_where(w + i, bits_at(words, i), math(part.get(w + i), part.get(g + i)));
    });
  });
}

// What a chunk is perturbed with, whatever the metric and the shape.
template <class T>
struct Site {
  T* w;
  const T* g;
  T* snapshot;            // nullptr where it has been taken
  const uint64_t* words;  // nullptr where the tensor is dense
  int64_t n;
  bool streaming;

  template <class Math>
  void perturb(const Math& math) const {
    if (words == nullptr) {
      perturb_chunk(w, g, snapshot, n, streaming, math);
    } else if (snapshot == nullptr) {
      move_words(w, g, words, n, math);
    } else {
      perturb_words(w, g, snapshot, words, n, streaming, math);
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
          const bool streaming = large && can_stream(s);
          const uint64_t* words = words_of(a.masks, chunk);
          if (T* compact = compact_of<T>(a.snapshots, a.offsets, chunk)) {
            save_selected(compact, w, words, chunk.size);
            if (!is_safe) return;
            s = nullptr;
          } else if (!is_safe) {
            return copy_words(s, w, words, chunk.size, streaming);
          }
          const Site<T> at{w, g, s, words, chunk.size, streaming};
          const double own = a.tensor_scale == nullptr ? 1.0 : a.tensor_scale[t];
          const S scale = perturb_scale<S>(row, a.shape, *a.norm, own);
          if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
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
