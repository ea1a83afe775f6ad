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

template <class T, class Metric>
void perturb_shaped(const samk_perturb_args& a, T* w, const T* g, T* s, int64_t n, bool streaming,
                    typename Opmath<T>::S c, const Metric& metric) {
  using S = typename Opmath<T>::S;
  switch (a.shape) {
    case SAMK_SIGN:
      return perturb_chunk(w, g, s, n, streaming, Perturb<S, Metric, Sign>{c, metric, {}});
    case SAMK_POWERED: {
      const Powered<S> shape{static_cast<S>(*a.peak), static_cast<S>(a.q - 1)};
      return perturb_chunk(w, g, s, n, streaming, Perturb<S, Metric, Powered<S>>{c, metric, shape});
    }
    default:
      return perturb_chunk(w, g, s, n, streaming, Perturb<S, Metric, Linear>{c, metric, {}});
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
          if (!is_safe) {
            sweep(chunk.size, [&](int64_t i, auto part) { part.copy(s + i, w + i, streaming); });
            return;
          }
          const double own = a.tensor_scale == nullptr ? 1.0 : a.tensor_scale[t];
          const S scale = perturb_scale<S>(row, a.shape, *a.norm, own);
          if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
            const Adaptive<S> metric{static_cast<S>(row[SAMK_ETA])};
            perturb_shaped(a, w, g, s, chunk.size, streaming, scale, metric);
          } else {
            perturb_shaped(a, w, g, s, chunk.size, streaming, scale, Euclidean{});
          }
        },
        Order::kBackward);
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
