#include "core/lane.h"
#include "engine/cpu.h"
#include "math/metric.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

// Each accumulator reads its own quarter of the chunk: four streams keep more loads in flight than one
// (measured 15 % faster), and their adds do not wait for each other. Sums are fp32 inside a chunk on
// purpose: fp64 across chunks loses nothing that 256 additions a lane could keep.
constexpr int kAccumulators = 4;

// note: [range of squares]
// Within these bounds a sum of fp32 squares has neither overflowed nor lost terms that count. Outside of them
// a chunk is summed once more in double: gradients beyond 1.8e19, or all below 1e-15. A sum of exactly 0
// is taken as it is, since gradients that are zero are common; so elements below 2.6e-23, whose squares are
// closer to 0 than to any other fp32 number, may count as 0. That takes less than 2^-150 from a sum for each.
constexpr double kLargeSum = 1e38, kSmallSum = 1e-30;

// T d of the elements at i. Weights are read only where the metric looks at them.
template <class T, class W, class Metric, class Part>
SAMK_INLINE auto weighed(const T* g, const W* w, int64_t i, const Metric& metric, Part part) {
  const auto d = part.get(g + i);
  if constexpr (Metric::kReadsWeight) {
    return metric.weigh(d, d, part.get(w + i));
  } else {
    return metric.weigh(d, d, d);
  }
}

template <class T, class W, class Metric, class Moment>
double sum_chunk(const T* g, const W* w, int64_t n, const Metric& metric, const Moment& moment) {
  using V = typename Opmath<T>::V;
  using S = typename Opmath<T>::S;
  V acc[kAccumulators] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))};
  const auto term = [&](int64_t i, auto part) { return moment(weighed(g, w, i, metric, part)); };
  const int64_t quarter = n / (kAccumulators * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes) {
#pragma GCC unroll 4
    for (int a = 0; a < kAccumulators; ++a) acc[a] = acc[a] + term(a * quarter + i, Whole{});
  }
  int64_t i = kAccumulators * quarter;
  for (int a = 0; i + kLanes <= n; i += kLanes, ++a) acc[a] = acc[a] + term(i, Whole{});
  if (i < n) acc[kAccumulators - 1] = acc[kAccumulators - 1] + term(i, Tail{static_cast<int>(n - i)});
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The sum of the elements under a mask. Runs of words that are 0 are passed over; scattered ones are summed
// like others.
template <class T, class W, class Metric, class Moment>
double sum_words(const T* g, const W* w, const uint64_t* words, int64_t n, const Metric& metric,
                 const Moment& moment) {
  using V = typename Opmath<T>::V;
  using S = typename Opmath<T>::S;
  V acc[kAccumulators] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))};
  const auto term = [&](int64_t i, auto part) {
    return moment(select(bits_at(words, i), weighed(g, w, i, metric, part), V(S(0))));
  };
  const auto add_run = [&](int64_t begin, int64_t size) {
    const int64_t end = begin + size, quarter = size / (kAccumulators * kLanes) * kLanes;
    int64_t i = begin;
    for (; i < begin + quarter; i += kLanes) {
#pragma GCC unroll 4
      for (int a = 0; a < kAccumulators; ++a) acc[a] = acc[a] + term(a * quarter + i, Whole{});
    }
    // One of the accumulators takes what is left: less than four packs and a tail.
    for (i = begin + kAccumulators * quarter; i + kLanes <= end; i += kLanes)
      acc[0] = acc[0] + term(i, Whole{});
    if (i < end) acc[0] = acc[0] + term(i, Tail{static_cast<int>(end - i)});
  };
  const WordMap map(words, n);
  const bool all = map.is_scattered() || map.zeros() * 8 < map.count();
  for (int64_t k = 0, end; k < map.count(); k = end) {
    end = all ? map.count() : map.run_end(k);
    if (all || !map.is_zero(k)) add_run(k * kWordBits, std::min(end * kWordBits, n) - k * kWordBits);
  }
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The squares once more in double, for a chunk whose sum left the range of fp32. Rare, so plain.
template <class T, class W, class Metric>
double wide_squares(const T* g, const W* w, const uint64_t* words, int64_t n, const Metric& metric) {
  double total = 0;
  sweep(n, [&](int64_t i, auto part) {
    alignas(64) float gs[kLanes], ws[kLanes];
    store(gs, part.get(g + i));
    if constexpr (Metric::kReadsWeight) {
      store(ws, part.get(w + i));
    } else {
      store(ws, part.get(g + i));
    }
    for (int k = 0; k < part.lanes(); ++k) {
      if (words != nullptr && !has_bit(words, i + k)) continue;
      const Lane<double> d(gs[k]);
      const double u = metric.weigh(d, d, Lane<double>(ws[k])).x;
      total += u * u;
    }
  });
  return total;
}

// The largest |u|; not finite if any u is not.
template <bool kMasked, class T, class W, class Metric>
double peak_chunk(const T* g, const W* w, const uint64_t* words, int64_t n, const Metric& metric) {
  using V = typename Opmath<T>::V;
  using S = typename Opmath<T>::S;
  V peak(S(0)), poison(S(0));
  sweep(n, [&](int64_t i, auto part) {
    V u = weighed(g, w, i, metric, part);
    if constexpr (kMasked) u = select(bits_at(words, i), u, V(S(0)));
    poison = poison + u * V(S(0));  // max drops a NaN, 0 * inf makes one
    peak = max(peak, abs(u));
  });
  alignas(64) S lanes[kLanes];
  store(lanes, peak);
  double largest = 0;
  for (S lane : lanes) largest = lane > largest ? lane : largest;
  return largest + sum_lanes(poison);
}

// One chunk as every moment sees it. Weights may be fp32 beside half gradients, as masters are.
template <class T, class W>
struct Site {
  const T* g;
  const W* w;
  const uint64_t* words;  // nullptr where all elements count
  int64_t n;

  template <class Metric, class Moment>
  double sum(const Metric& metric, const Moment& moment) const {
    return words == nullptr ? sum_chunk(g, w, n, metric, moment) : sum_words(g, w, words, n, metric, moment);
  }
  template <class Metric>
  double peak(const Metric& metric) const {
    return words == nullptr ? peak_chunk<false>(g, w, words, n, metric)
                            : peak_chunk<true>(g, w, words, n, metric);
  }
};

// See note: [range of squares].
template <class T, class W, class Metric>
double square_chunk(const Site<T, W>& at, const Metric& metric) {
  const double sum = at.sum(metric, Square{});
  if constexpr (!std::is_same<T, double>::value) {
    if (!(sum <= kLargeSum) || (sum != 0 && sum < kSmallSum)) {
      return wide_squares(at.g, at.w, at.words, at.n, metric);
    }
  }
  return sum;
}

template <class T, class W, class Metric>
double measure_chunk(const samk_sq_norm_args& a, const Site<T, W>& at, const Metric& metric) {
  using S = typename Opmath<T>::S;
  switch (a.moment) {
    case SAMK_PEAK:
      return at.peak(metric);
    case SAMK_POWER:
      return at.sum(metric, Power<S>{static_cast<S>(*a.peak), static_cast<S>(a.q)});
    default:
      return square_chunk(at, metric);
  }
}

}  // namespace

int sq_norm(const samk_plan& plan, const samk_sq_norm_args& a) {
  const bool is_wide = a.params.data != nullptr && a.params.dtype == SAMK_F32 && a.grads.dtype >= SAMK_BF16;
  if (!is_wide && check_one_dtype("sq_norm", a.grads.dtype, a.params) != 0) return 1;
  const auto& chunks = plan.chunks.chunks();
  double* const partials = plan.cleared_partials(chunks.size());
  const int status = with_dtype("sq_norm", a.grads.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename Opmath<T>::S;
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t c) {
      const double* row = a.table + a.row[chunk.tensor] * SAMK_COLUMNS;
      const T* g = element<T>(a.grads, chunk.tensor, chunk.begin);
      const uint64_t* words = words_of(a.masks, chunk);
      const Site<T, T> at{g, g, words, chunk.size};
      if (g == nullptr || row[SAMK_METRIC] == SAMK_FIXED) {
        partials[c] = 0;
      } else if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
        const Adaptive<S> metric{static_cast<S>(row[SAMK_ETA])};
        if constexpr (is_half<T>) {
          if (is_wide) {
            const auto* w = element<const float>(a.params, chunk.tensor, chunk.begin);
            partials[c] = measure_chunk(a, Site<T, float>{g, w, words, chunk.size}, metric);
            return;
          }
        }
        const T* w = element<const T>(a.params, chunk.tensor, chunk.begin);
        partials[c] = measure_chunk(a, Site<T, T>{g, w, words, chunk.size}, metric);
      } else if (row[SAMK_METRIC] == SAMK_FISHER) {
        const Fisher<S> metric{static_cast<S>(row[SAMK_ETA])};
        partials[c] = a.moment == SAMK_SQUARE ? square_chunk(at, metric) : static_cast<double>(NAN);
      } else {
        partials[c] = measure_chunk(a, at, Euclidean{});
      }
    });
    return 0;
  });
  if (status != 0) return status;

  const bool is_peak = a.moment == SAMK_PEAK;
  // A NaN on either side stays: the comparison is written so that it is never dropped.
  const auto join = [is_peak](double x, double y) {
    return !is_peak ? x + y : (y > x || y != y) && x == x ? y : x;
  };
  if (a.per_tensor != nullptr) std::fill_n(a.per_tensor, plan.chunks.count(), 0.0);
  double total = 0;
  for (size_t c = 0; c < chunks.size(); ++c) {
    total = join(total, partials[c]);
    if (a.per_tensor != nullptr) {
      double& own = a.per_tensor[chunks[c].tensor];
      own = join(own, partials[c]);
    }
  }
  *a.out = a.root <= 1 ? total : a.root == 2 ? std::sqrt(total) : std::pow(total, 1 / a.root);
  return 0;
}

}  // namespace SAMK_ISA
}  // namespace samk
