#include "engine/launch.cuh"
#include "engine/masked.cuh"
#include "math/metric.h"
#include "math/power.h"

namespace samk {
namespace {

enum List { kGrads, kParams, kPerTensor, kMasks };

struct Scalars {
  const double* table;
  const double* peak;
  double q, root;
  double* out;
  double* partials;
  unsigned* counter;
};

template <bool kHasMasks>
using P = Parameters<kMasks + kHasMasks, Scalars>;

// NaN on either side stays: the comparison is written so that it is never dropped.
struct Larger {
  __device__ __forceinline__ double operator()(double a, double b) const {
    return (b > a || b != b) && a == a ? b : a;
  }
};

// note: [range of squares]
// Within these bounds a sum of fp32 squares has neither overflowed nor lost terms that count. Outside of them
// the same elements are read once more in double: gradients beyond 1.8e19, or all below 1e-15. A sum of
// exactly 0 is taken as it is, since gradients that are zero are common; so elements below 2.6e-23, whose
// squares are closer to 0 than to any other fp32 number, may count as 0. That takes less than 2^-150 from a
// sum for each.
constexpr double kLargeSum = 1e38, kSmallSum = 1e-30;

template <class G, class W>
struct Pair {
  G g;
  W w;
};

// What this thread's elements of the chunk add up to. Sums are fp32 inside a chunk on purpose: a thread adds
// a few hundred numbers, and across chunks they are fp64.
template <class G, class W, class M, class Metric, class Term>
__device__ __forceinline__ double sum_thread(const G* g, const W* w, int n, const M& mask,
                                             const Metric& metric, const Term& term) {
  using V = Lane<typename Stored<W>::S>;
  constexpr int kWidth = Metric::kReadsWeight ? pack_width<G, W>() : pack_width<G>();
  V sums[kWidth];
#pragma unroll
  for (V& sum : sums) sum = V(0);
  const auto load = [&](int i, auto word, auto access) {
    constexpr int kPack = decltype(access)::kWidth;
    Pair<Raw<G, kPack>, std::conditional_t<Metric::kReadsWeight, Raw<W, kPack>, char>> x{};
    if (!word.is_empty()) {
      x.g = access.get(g + i);
      if constexpr (Metric::kReadsWeight) x.w = access.get(w + i);
    }
    return x;
  };
  const auto add = [&](int, auto word, const auto& x, auto access) {
    if (word.is_empty()) return;
#pragma unroll
    for (int k = 0; k < decltype(access)::kWidth; ++k) {
      if (!word.has(k)) continue;
      const V d(widen(x.g.v[k]).x);
      if constexpr (Metric::kReadsWeight) {
        term(sums[k], metric.weigh(d, d, V(widen(x.w.v[k]).x)));
      } else {
        term(sums[k], metric.weigh(d, d, d));
      }
    }
  };
  bool is_aligned = are_aligned(g);
  if constexpr (Metric::kReadsWeight) is_aligned = are_aligned(g, w);
  constexpr int kBytes = sizeof(G) + (Metric::kReadsWeight ? sizeof(W) : 0);
  sweep_in_order<kWidth, kUnrollOf<M, Term::kUnroll, kWidth * kBytes>>(n, is_aligned, mask, load, add);
  const double total = term.total(sums);
  if constexpr (Term::kSquares && std::is_same<typename V::Scalar, float>::value) {
    if (!(total <= kLargeSum) || (total != 0 && total < kSmallSum)) {
      double wide = 0;
      sweep_in_order<kWidth, 1>(n, is_aligned, mask, load, [&](int, auto word, const auto& x, auto access) {
        if (word.is_empty()) return;
#pragma unroll
        for (int k = 0; k < decltype(access)::kWidth; ++k) {
          if (!word.has(k)) continue;
          const Lane<double> d(widen(x.g.v[k]).x);
          Lane<double> w_or_d = d;
          if constexpr (Metric::kReadsWeight) w_or_d = Lane<double>(widen(x.w.v[k]).x);
          const Lane<double> u = metric.weigh(d, d, w_or_d);
          wide += u.x * u.x;
        }
      });
      return wide;
    }
  }
  return total;
}

// How terms join: sums of a moment, or the largest.
template <class Moment, int kUnroll_>
struct Sum {
  static constexpr int kUnroll = kUnroll_;
  static constexpr bool kSquares = std::is_same<Moment, Square>::value;
  Moment moment;
  template <class V>
  __device__ __forceinline__ void operator()(V& sum, V u) const {
    sum = sum + moment(u);
  }
  template <class V, int kWidth>
  __device__ __forceinline__ double total(V (&sums)[kWidth]) const {
    double total = 0;
#pragma unroll
    for (const V& sum : sums) total += sum.x;
    return total;
  }
};
struct Largest {
  static constexpr int kUnroll = SAMK_NORM_LOADS;
  static constexpr bool kSquares = false;
  template <class V>
  __device__ __forceinline__ void operator()(V& largest, V u) const {
    const V size = abs(u);
    // Written so that a NaN is taken and kept.
    if (!(size.x <= largest.x) && largest.x == largest.x) largest = size;
  }
  template <class V, int kWidth>
  __device__ __forceinline__ double total(V (&found)[kWidth]) const {
    double largest = 0;
#pragma unroll
    for (const V& x : found) largest = Larger{}(largest, x.x);
    return largest;
  }
};

template <int kMoment, class S>
__device__ __forceinline__ auto make_term(const Scalars& scalars) {
  if constexpr (kMoment == SAMK_PEAK) {
    return Largest{};
  } else if constexpr (kMoment == SAMK_POWER) {
    return Sum<Power<S>, 1>{{static_cast<S>(*scalars.peak), static_cast<S>(scalars.q)}};
  } else {
    return Sum<Square, SAMK_NORM_LOADS>{};
  }
}

template <int kMoment>
constexpr int kBlocks = kMoment == SAMK_POWER ? kBlocksPerSmHeavy : SAMK_NORM_BLOCKS;

template <class G, class W, int kMoment, bool kHasMasks>
__global__ void __launch_bounds__(kThreads, kBlocks<kMoment>)
    sq_norm_kernel(const __grid_constant__ P<kHasMasks> p) {
  using S = typename Stored<W>::S;
  using Join = std::conditional_t<kMoment == SAMK_PEAK, Larger, Add>;
  const auto& tensors = p.tensors;
  double* const partials = p.scalars.partials + tensors.first_chunk;
  BlockSum<1> join;
  for_each_chunk<Order::kForward>(tensors, [&](const Chunk& chunk) {
    const double* row = p.scalars.table + tensors.row[chunk.tensor] * SAMK_COLUMNS;
    const G* g = element<const G>(tensors, kGrads, chunk);
    const W* w = element<const W>(tensors, kParams, chunk);
    double sum[1] = {0};
    if (g != nullptr && chunk.size > 0 && row[SAMK_METRIC] != SAMK_FIXED) {
      const auto term = make_term<kMoment, S>(p.scalars);
      const auto mask = find_mask<MaskOf<kHasMasks>>(tensors, kMasks, chunk);
      if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
        sum[0] = sum_thread(g, w, chunk.size, mask, Adaptive<S>{static_cast<S>(row[SAMK_ETA])}, term);
      } else if (row[SAMK_METRIC] == SAMK_FISHER) {
        // In the kernel of squares alone; the others would only grow.
        sum[0] = static_cast<double>(NAN);
        if constexpr (kMoment == SAMK_SQUARE) {
          sum[0] = sum_thread(g, w, chunk.size, mask, Fisher<S>{static_cast<S>(row[SAMK_ETA])}, term);
        }
      } else {
        sum[0] = sum_thread(g, w, chunk.size, mask, Euclidean{}, term);
      }
      join(sum, Join{});
    }
    if (threadIdx.x == 0) partials[chunk.index] = sum[0];
  });
  if (!is_last_block(p.scalars.counter)) return;

  // Every launch closes the sums of its own tensors, a warp for each; the last one also that of all.
  const int full = tensors.first_full[tensors.count];
  const int lane = threadIdx.x % kWarp;
  for (int t = threadIdx.x / kWarp; t < tensors.count; t += kWarps) {
    double* const own = static_cast<double*>(tensors.data[kPerTensor][t]);
    if (own == nullptr) break;  // all tensors have one, or none
    double sum = lane == 0 ? __ldcg(partials + full + t) : 0;
    for (int c = tensors.first_full[t] + lane; c < tensors.first_full[t + 1]; c += kWarp)
      sum = Join{}(sum, __ldcg(partials + c));
    sum = join_warp(sum, Join{});
    if (lane == 0) *own = sum;
  }
  if (!tensors.is_last) return;
  const int chunks = tensors.first_chunk + full + tensors.count;
  double sum[1] = {0};
  for (int c = threadIdx.x; c < chunks; c += kThreads)
    sum[0] = Join{}(sum[0], __ldcg(p.scalars.partials + c));
  join(sum, Join{});
  if (threadIdx.x == 0) {
    const double root = p.scalars.root;
    *p.scalars.out = root <= 1 ? sum[0] : root == 2 ? std::sqrt(sum[0]) : power(sum[0], 1 / root);
  }
}

}  // namespace
}  // namespace samk

extern "C" int samk_sq_norm(const samk_plan* plan, const samk_sq_norm_args* a) {
  using namespace samk;
  if (a->workspace == nullptr) return fail("sq_norm: a workspace is needed");
  const Workspace workspace(a->workspace);
  const Scalars scalars{a->table, a->peak, a->q, a->root, a->out, workspace.partials, workspace.counter};
  const Site site{"sq_norm", *plan, a->row, nullptr, a->queue.device, a->queue.stream};
  if (plan->launches.count() == 0) return clear(site, a->out, 1);
  const int32_t weight = a->params.data == nullptr ? a->grads.dtype : a->params.dtype;
  const auto run = [&](auto kernel, int blocks) {
    return launch(site, kernel, blocks, scalars, [&](int list, int32_t t) -> void* {
      if (list == kGrads) return at(a->grads, t);
      if (list == kParams) return at(a->params, t);
      if (list == kMasks) return at(a->masks, t);
      return a->per_tensor == nullptr ? nullptr : a->per_tensor + t;
    });
  };
  const auto masked = [&](auto w, auto g, auto masks) {
    using W = decltype(w);
    using G = decltype(g);
    constexpr bool kHas = decltype(masks)::value;
    switch (a->moment) {
      case SAMK_PEAK:
        return run(sq_norm_kernel<G, W, SAMK_PEAK, kHas>, kBlocks<SAMK_PEAK>);
      case SAMK_POWER:
        return run(sq_norm_kernel<G, W, SAMK_POWER, kHas>, kBlocks<SAMK_POWER>);
      default:
        return run(sq_norm_kernel<G, W, SAMK_SQUARE, kHas>, kBlocks<SAMK_SQUARE>);
    }
  };
  return with_dtypes("sq_norm", weight, a->grads.dtype, [&](auto w, auto g) {
    return a->masks.data == nullptr ? masked(w, g, std::false_type{}) : masked(w, g, std::true_type{});
  });
}
