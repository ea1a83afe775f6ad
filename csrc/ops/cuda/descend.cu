#include "engine/launch.cuh"
#include "engine/masked.cuh"
#include "math/descent.h"

namespace samk {
namespace {

enum List { kParams, kGrads, kSources, kState0, kState1, kStep };  // sources: snapshots, or masters
template <int kRule>
constexpr int kListsOf = kRule == SAMK_SGD ? kState0 + 1 : kStep + 1;  // and the masks, where there are some

struct Scalars {
  const double* table;
  const double* guard;
  const float* found_inf;
  const float* inv_scale;
  unsigned* counter;
};

// Weights as they are read, and the state beside them: in the type of the masters where there are any.
template <class W, bool kHasMasters>
using Source = std::conditional_t<kHasMasters, float, W>;

__device__ __forceinline__ bool is_safe(const Scalars& scalars) {
  return (scalars.guard == nullptr || isfinite(*scalars.guard)) &&
         (scalars.found_inf == nullptr || *scalars.found_inf == 0.0f);
}

// Where the weights of a pack are as they were before the perturbation: in a word that is 0 nothing was
// perturbed, and there is no snapshot of it.
template <class M>
__device__ __forceinline__ const M* unperturbed(const M* w, const M* snapshot, Word word) {
  return word.is_empty() ? w : snapshot;
}
template <class W, class M>
__device__ __forceinline__ const M* unperturbed(const W*, const M* source, Everything) {
  return source;
}

// w = source: the same bits, or the rounded master.
template <class W, class M, class Words>
__device__ __forceinline__ void restore_chunk(W* w, const M* source, int n, const Words& mask) {
  if constexpr (std::is_same<W, M>::value) {
    copy_chunk<kReaderOf<SAMK_STREAM_WEIGHTS>>(w, source, n, mask);
  } else {
    sweep<pack_width<W>(), 1>(
        n, are_aligned(w, source), [&](int i, auto access) { return access.get(source + i); },
        [&](int i, const auto& x, auto access) {
          Raw<W, decltype(access)::kWidth> rounded;
#pragma unroll
          for (int k = 0; k < decltype(access)::kWidth; ++k) rounded.v[k] = narrow<W>(widen(x.v[k]));
          access.template put<kReaderOf<SAMK_STREAM_WEIGHTS>>(w + i, rounded);
        });
  }
}

template <class V, class S>
__device__ __forceinline__ V gradient(const Decayed<S>& decay, V g, V w) {
  return decay.weight_decay != S(0) ? decay(g, w) : decay(g);
}

// Writes the new weight, and the master where there is one.
template <class W, class M, class A, class V, int kWidth>
__device__ __forceinline__ void put_weights(W* w, M* master, int i, const V (&x)[kWidth], A access) {
  Raw<W, kWidth> rounded;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) rounded.v[k] = narrow<W>(x[k]);
  access.template put<kReaderOf<SAMK_STREAM_WEIGHTS>>(w + i, rounded);
  if constexpr (!std::is_same<W, M>::value) {
    Raw<M, kWidth> whole;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) whole.v[k] = narrow<M>(x[k]);
    access.put(master + i, whole);
  }
}

template <int kUnroll, class W, class G, class M, class Words>
__device__ __forceinline__ void sgd_chunk(W* w, const G* g, M* source, M* buffer, bool is_fresh, int n,
                                          const Words& mask, const Decayed<typename Stored<M>::S>& decay,
                                          const Sgd<typename Stored<M>::S>& rule) {
  using V = Lane<typename Stored<M>::S>;
  const bool reads_buffer = buffer != nullptr && !is_fresh;
  const auto load = [&](int i, auto word, auto access) {
    constexpr int kWidth = decltype(access)::kWidth;
    struct {
      Raw<M, kWidth> w, b;
      Raw<G, kWidth> g;
    } x;
    x.w = access.get(unperturbed(w, source, word) + i);
    x.g = access.get(g + i);
    if (reads_buffer) x.b = access.get(buffer + i);
    return x;
  };
  sweep<pack_width<W, G>(), kUnroll>(
      n, are_aligned(w, g, source, buffer), mask, load, [&](int i, auto, const auto& x, auto access) {
        constexpr int kWidth = decltype(access)::kWidth;
        V moved[kWidth];
        Raw<M, kWidth> kept;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const V old(widen(x.w.v[k]).x);
          const V d = gradient(decay, V(widen(x.g.v[k]).x), old);
          if (buffer == nullptr) {
            moved[k] = rule.weight(old, d);
          } else {
            const V b = reads_buffer ? rule.buffer(V(widen(x.b.v[k]).x), d) : d;
            moved[k] = rule.weight(old, d, b);
            kept.v[k] = narrow<M>(b);
          }
        }
        put_weights(w, source, i, moved, access);
        if (buffer != nullptr) access.put(buffer + i, kept);
      });
}

template <int kUnroll, class W, class G, class M, class Words>
__device__ __forceinline__ void adam_chunk(W* w, const G* g, M* source, M* first, M* second, int n,
                                           const Words& mask, const Decayed<typename Stored<M>::S>& decay,
                                           const Adam<typename Stored<M>::S>& rule) {
  using V = Lane<typename Stored<M>::S>;
  const auto load = [&](int i, auto word, auto access) {
    constexpr int kWidth = decltype(access)::kWidth;
    struct {
      Raw<M, kWidth> w, m, v;
      Raw<G, kWidth> g;
    } x;
    x.w = access.get(unperturbed(w, source, word) + i);
    x.g = access.get(g + i);
    x.m = access.get(first + i);
    x.v = access.get(second + i);
    return x;
  };
  sweep<pack_width<W, G>(), kUnroll>(n, are_aligned(w, g, source, first, second), mask, load,
                                     [&](int i, auto, const auto& x, auto access) {
                                       constexpr int kWidth = decltype(access)::kWidth;
                                       V moved[kWidth];
                                       Raw<M, kWidth> m, v;
#pragma unroll
                                       for (int k = 0; k < kWidth; ++k) {
                                         const V old(widen(x.w.v[k]).x);
                                         const V d = gradient(decay, V(widen(x.g.v[k]).x), old);
                                         const V new_m = rule.first_moment(V(widen(x.m.v[k]).x), d);
                                         const V new_v = rule.second_moment(V(widen(x.v.v[k]).x), d);
                                         moved[k] = rule.weight(old, new_m, new_v);
                                         m.v[k] = narrow<M>(new_m);
                                         v.v[k] = narrow<M>(new_v);
                                       }
                                       put_weights(w, source, i, moved, access);
                                       access.put(first + i, m);
                                       access.put(second + i, v);
                                     });
}

// One thread works out the scalars of a tensor for its block, and only where row or step differ from the
// chunk before: two powers in fp64 cost as much as a few hundred elements.
template <class S>
class AdamScalars {
 public:
  __device__ __forceinline__ Adam<S> operator()(const double* row, float step) {
    __shared__ Adam<S> shared[2];
    if (row != row_ || step != step_) {
      turn_ ^= 1;
      if (threadIdx.x == 0) shared[turn_] = adam<S>(row, static_cast<double>(step) + 1);
      __syncthreads();
      row_ = row;
      step_ = step;
    }
    return shared[turn_];
  }

 private:
  const double* row_ = nullptr;
  float step_ = 0;
  int turn_ = 0;
};

// Blocks that share a multiprocessor, and packs a thread reads before it writes: enough bytes in flight
// without a spilled register, of which a thread may have 64, 80 or 128 beside four, three or two blocks. In
// KB, with the momentum of SGD:
//                                    SGD                     Adam
//   fp32                             4 blocks x 1 pack   48  4 x 1  64
//   half                             3 x 2               72  3 x 1  48
//   fp64                             2 x 2               48  2 x 2  64
//   half gradients of fp32 weights,
//   or fp32 masters of half ones     2 x 2               80  2 x 1  56
// Under masks Adam in fp32 has 3 blocks and 48 KB: words take registers too.
template <class W, class G, bool kHasMasters, int kRule, bool kHasMasks>
struct Tuning {
  using M = Source<W, kHasMasters>;
  static constexpr int kWidth = pack_width<W, G>();
  static constexpr int kBlocksOfFour =
      kHasMasks && kRule == SAMK_ADAM ? kBlocksPerSmMiddle : SAMK_DESCEND_BLOCKS;
  static constexpr int kBlocks = kWidth == 4      ? kBlocksOfFour
                                 : sizeof(M) == 2 ? SAMK_DESCEND_HALF_BLOCKS
                                                  : kBlocksPerSmHeavy;
  static constexpr int kUnroll =
      SAMK_DESCEND_LOADS * (kRule == SAMK_SGD ? (kWidth == 4 ? 1 : 2) : (kWidth == 2 ? 2 : 1));
  static constexpr int kBytes = sizeof(G) + sizeof(M) * (kRule == SAMK_SGD ? 2 : 3);  // read for an element
  static_assert(kBlocks * kThreads * kUnroll * kWidth * kBytes >= kBytesInFlight,
                "memory would wait for threads");
};

template <class W, class G, bool kHasMasters, int kRule, bool kHasMasks>
__global__ void __launch_bounds__(kThreads, Tuning<W, G, kHasMasters, kRule, kHasMasks>::kBlocks)
    descend_kernel(const __grid_constant__ Parameters<kListsOf<kRule> + kHasMasks, Scalars> p) {
  using T = Tuning<W, G, kHasMasters, kRule, kHasMasks>;
  using M = Source<W, kHasMasters>;
  using S = typename Stored<M>::S;
  const auto& tensors = p.tensors;
  const bool safe = is_safe(p.scalars);
  const double inv_scale = p.scalars.inv_scale == nullptr ? 1.0 : *p.scalars.inv_scale;
  AdamScalars<S> adam_scalars;
  for_each_chunk<kOrderOf<SAMK_DESCEND_BACKWARD>>(tensors, [&](const Chunk& chunk) {
    W* w = element<W>(tensors, kParams, chunk);
    if (w == nullptr || chunk.size == 0) return;
    const G* g = element<const G>(tensors, kGrads, chunk);
    M* source = element<M>(tensors, kSources, chunk);
    const auto mask = find_mask<MaskOf<kHasMasks>>(tensors, kListsOf<kRule>, chunk);
    if (g == nullptr || !safe) {
      if (source != nullptr) restore_chunk(w, source, chunk.size, mask);
      return;
    }
    if (source == nullptr) {
      if constexpr (kHasMasters) return;  // in a list of masters, one without has no part
      if constexpr (!kHasMasters) source = w;
    }
    const uint16_t tagged = tensors.row[chunk.tensor];
    const double* row = p.scalars.table + (tagged & ~kFlag) * SAMK_COLUMNS;
    const auto decay = decayed<S>(row, kRule, inv_scale);
    if constexpr (kRule == SAMK_SGD) {
      M* buffer = row[SAMK_MOMENTUM] != 0 ? element<M>(tensors, kState0, chunk) : nullptr;
      sgd_chunk<T::kUnroll>(w, g, source, buffer, (tagged & kFlag) != 0, chunk.size, mask, decay,
                            sgd<S>(row));
    } else {
      const float step = *static_cast<const float*>(tensors.data[kStep][chunk.tensor]);
      adam_chunk<T::kUnroll>(w, g, source, element<M>(tensors, kState0, chunk),
                             element<M>(tensors, kState1, chunk), chunk.size, mask, decay,
                             adam_scalars(row, step));
    }
  });
  if constexpr (kRule == SAMK_ADAM) {
    // Nobody reads a step counter any more once every block is here.
    if (!is_last_block(p.scalars.counter) || !safe) return;
    for (int t = threadIdx.x; t < tensors.count; t += kThreads) {
      if (has(tensors, kGrads, t)) *static_cast<float*>(tensors.data[kStep][t]) += 1.0f;
    }
  }
}

}  // namespace
}  // namespace samk

extern "C" int samk_descend(const samk_plan* plan, const samk_descend_args* a) {
  using namespace samk;
  if (a->rule != SAMK_SGD && a->rule != SAMK_ADAM) return fail("descend_: rule is neither SGD nor Adam");
  if (a->rule == SAMK_ADAM && a->step == nullptr) return fail("descend_: Adam needs step counters");
  if (a->rule == SAMK_ADAM && a->workspace == nullptr) return fail("descend_: Adam needs a workspace");
  const bool has_masters = a->masters.data != nullptr;
  const samk_list& sources = has_masters ? a->masters : a->snapshots;
  const int32_t state = has_masters ? a->masters.dtype : a->params.dtype;
  for (const samk_list* list : {&sources, &a->state[0], &a->state[1]}) {
    if (list->data != nullptr && list->dtype != state) {
      return fail(
          "descend_: snapshots and state have the dtype of the weights, or of the masters; one here differs");
    }
  }
  unsigned* counter = a->workspace == nullptr ? nullptr : Workspace(a->workspace).counter;
  const Scalars scalars{a->table, a->guard, a->found_inf, a->inv_scale, counter};
  const Site site{"descend_", *plan, a->row, a->fresh, a->queue.device, a->queue.stream};
  const int masks = a->rule == SAMK_SGD ? kListsOf<SAMK_SGD> : kListsOf<SAMK_ADAM>;
  const auto run = [&](auto kernel, int blocks) {
    return launch(site, kernel, blocks, scalars, [&](int list, int32_t t) -> void* {
      if (list == masks) return at(a->masks, t);
      switch (list) {
        case kParams:
          return at(a->params, t);
        case kGrads:
          return at(a->grads, t);
        case kSources:
          return at(sources, t);
        case kStep:
          return a->step[t];
        default:
          return at(a->state[list - kState0], t);
      }
    });
  };
  const auto ruled = [&](auto w, auto g, auto masters, auto masked) {
    using W = decltype(w);
    using G = decltype(g);
    constexpr bool kMasters = decltype(masters)::value, kHas = decltype(masked)::value;
    return a->rule == SAMK_SGD ? run(descend_kernel<W, G, kMasters, SAMK_SGD, kHas>,
                                     Tuning<W, G, kMasters, SAMK_SGD, kHas>::kBlocks)
                               : run(descend_kernel<W, G, kMasters, SAMK_ADAM, kHas>,
                                     Tuning<W, G, kMasters, SAMK_ADAM, kHas>::kBlocks);
  };
  if (has_masters) {
    // Masters are whole, and weights that were not perturbed are the rounded masters: no mask is asked.
    return with_masters("descend_", a->params.dtype, a->grads.dtype, a->masters.dtype,
                        [&](auto w) { return ruled(w, w, std::true_type{}, std::false_type{}); });
  }
  return with_dtypes("descend_", a->params.dtype, a->grads.dtype, [&](auto w, auto g) {
    return a->masks.data == nullptr ? ruled(w, g, std::false_type{}, std::false_type{})
                                    : ruled(w, g, std::false_type{}, std::true_type{});
  });
}
