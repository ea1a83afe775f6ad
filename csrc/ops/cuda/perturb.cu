#include "engine/launch.cuh"
#include "engine/masked.cuh"
#include "math/metric.h"
#include "math/perturb.h"
#include "math/random.h"

namespace samk {
namespace {

// Others: snapshots, or masters. A number is a whole number in the place of an address.
enum List { kParams, kGrads, kOthers, kTensorScale, kMasks };

struct Scalars {
  const double* table;
  const double* peak;
  const double* norm;
  double q;
  uint64_t seed;
  uint32_t step;
};

// How weights are stored: to nearest, or at random; see note: [stochastic rounding] in sam_kernels.h.
enum Rounding { kNearest, kAtRandom };

template <bool kHasMasks, int kRounding>
constexpr int kListsOf = kMasks + kHasMasks + (kRounding == kAtRandom);

template <bool kHasMasks, int kRounding>
using P = Parameters<kListsOf<kHasMasks, kRounding>, Scalars>;

template <int kShape, class S>
__device__ __forceinline__ auto make_shape(const Scalars& scalars) {
  if constexpr (kShape == SAMK_SIGN) {
    return Sign{};
  } else if constexpr (kShape == SAMK_POWERED) {
    return Powered<S>{static_cast<S>(*scalars.peak), static_cast<S>(scalars.q - 1)};
  } else {
    return Linear{};
  }
}

struct Nearest {
  template <class W, int kWidth>
  __device__ __forceinline__ auto of_pack(int) const {
    return [](int, auto x) { return narrow<W>(x); };
  }
};

// Of one chunk. A pack of bf16 is eight elements, whose bits are one call of philox: note: [eight
// neighbours]. Where an address is not aligned a thread has one element, and calls for its eight.
class AtRandom {
 public:
  __device__ __forceinline__ AtRandom(const Scalars& scalars, void* number, int64_t begin)
      : seed_(scalars.seed),
        begin_(begin),
        step_(scalars.step),
        number_(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(number))) {}

  template <class W, int kWidth>
  __device__ __forceinline__ auto of_pack(int i) const {
    static_assert(kWidth == 8 || kWidth == 1, "a pack shares one call of philox");
    const int64_t first = begin_ + i;
    const Words words = random_words_of_eight(seed_, step_, number_, first);
    return
        [words, first](int k, Lane<float> x) { return to_bf16_at_random(x.x, sixteen_of(words, first + k)); };
  }

 private:
  uint64_t seed_;
  int64_t begin_;
  uint32_t step_, number_;
};

template <class A, class B>
struct Two {
  A a;
  B b;
};

// The packs at i of both lists, where something in their word is selected.
template <class A, class B, class Word, class Access>
__device__ __forceinline__ auto load_two(const A* a, const B* b, int i, Word word, Access access) {
  Two<Raw<A, Access::kWidth>, Raw<B, Access::kWidth>> x{};
  if (!word.is_empty()) {
    x.a = access.get(a + i);
    x.b = access.get(b + i);
  }
  return x;
}

// snapshot = w; w = math(w, g). The snapshot takes the bits, so that it keeps the payload of a NaN, and so do
// the weights that are not selected. It may be where the gradient is, so a thread saves a pack after it has
// read the same pack of that, and no pointer here may be declared __restrict__.
template <int kUnroll, class W, class G, class M, class Math, class Round>
__device__ __forceinline__ void perturb_chunk(W* w, const G* g, W* snapshot, int n, const M& mask,
                                              const Math& math, const Round& round) {
  using V = Lane<typename Stored<W>::S>;
  const auto load = [&](int i, auto word, auto access) { return load_two(w, g, i, word, access); };
  constexpr int kWidth = pack_width<W, G>(), kBytes = kWidth * (sizeof(W) + sizeof(G));
  sweep<kWidth, kUnrollOf<M, kUnroll, kBytes>>(
      n, are_aligned(w, g, snapshot), mask, load, [&](int i, auto word, const auto& x, auto access) {
        if (word.is_empty()) return;
        auto moved = x.a;
        const auto narrow_one = round.template of_pack<W, decltype(access)::kWidth>(i);
#pragma unroll
        for (int k = 0; k < decltype(access)::kWidth; ++k) {
          if (word.has(k)) moved.v[k] = narrow_one(k, math(V(widen(x.a.v[k]).x), V(widen(x.b.v[k]).x)));
        }
        access.template put<kReaderOf<SAMK_STREAM_SNAPSHOT>>(snapshot + i, x.a);
        access.template put<kReaderOf<SAMK_STREAM_WEIGHTS>>(w + i, moved);
      });
}

// w = round(math(master, g)); the master stays.
template <int kUnroll, class W, class G, class M, class Math, class Round>
__device__ __forceinline__ void perturb_chunk(W* w, const G* g, const float* master, int n, const M& mask,
                                              const Math& math, const Round&) {
  using V = Lane<float>;
  const auto load = [&](int i, auto word, auto access) { return load_two(master, g, i, word, access); };
  constexpr int kWidth = pack_width<W, G>(), kBytes = kWidth * (sizeof(float) + sizeof(G));
  sweep<kWidth, kUnrollOf<M, kUnroll, kBytes>>(
      n, are_aligned(w, g, master), mask, load, [&](int i, auto word, const auto& x, auto access) {
        if (word.is_empty()) return;
        Raw<W, decltype(access)::kWidth> moved;
        if constexpr (std::is_same<M, Mask>::value) moved = access.get(w + i);
#pragma unroll
        for (int k = 0; k < decltype(access)::kWidth; ++k) {
          if (word.has(k)) moved.v[k] = narrow<W>(math(V(x.a.v[k]), V(widen(x.b.v[k]).x)));
        }
        access.template put<kReaderOf<SAMK_STREAM_WEIGHTS>>(w + i, moved);
      });
}

template <bool kHasMasks, int kRounding>
__device__ __forceinline__ auto make_rounding(const P<kHasMasks, kRounding>& p, const Chunk& chunk) {
  if constexpr (kRounding == kAtRandom) {
    return AtRandom(p.scalars, p.tensors.data[kMasks + kHasMasks][chunk.tensor], chunk.begin);
  } else {
    return Nearest{};
  }
}

// Three for fp64: the roots and quotients of Fisher's metric would spill registers beside four. Two packs of
// a thread and three blocks still make 48 KB.
template <class W, int kShape, int kRounding = kNearest>
constexpr int kBlocks = kShape == SAMK_POWERED || kRounding == kAtRandom          ? kBlocksPerSmHeavy
                        : kShape == SAMK_LINEAR && std::is_same<W, double>::value ? kBlocksPerSmMiddle
                                                                                  : SAMK_PERTURB_BLOCKS;

template <class W, class G, class Other, int kShape, bool kHasMasks, int kRounding>
__global__ void __launch_bounds__(kThreads, kBlocks<W, kShape, kRounding>)
    perturb_kernel(const __grid_constant__ P<kHasMasks, kRounding> p) {
  constexpr bool kHasMaster = std::is_const<Other>::value;
  constexpr int kUnroll = kShape == SAMK_POWERED ? 1 : SAMK_PERTURB_LOADS;
  using S = typename Stored<W>::S;
  const auto& tensors = p.tensors;
  const double norm = *p.scalars.norm;
  const bool is_safe = isfinite(norm);
  for_each_chunk<kOrderOf<SAMK_PERTURB_BACKWARD>>(tensors, [&](const Chunk& chunk) {
    const double* row = p.scalars.table + tensors.row[chunk.tensor] * SAMK_COLUMNS;
    W* w = element<W>(tensors, kParams, chunk);
    const G* g = element<const G>(tensors, kGrads, chunk);
    Other* other = element<Other>(tensors, kOthers, chunk);
    if (w == nullptr || g == nullptr || other == nullptr || row[SAMK_METRIC] == SAMK_FIXED) return;
    const auto mask = find_mask<MaskOf<kHasMasks>>(tensors, kMasks, chunk);
    const bool is_fisher = row[SAMK_METRIC] == SAMK_FISHER;
    if (!is_safe || (is_fisher && kShape != SAMK_LINEAR)) {
      if constexpr (!kHasMaster) {
        copy_chunk<kReaderOf<SAMK_STREAM_SNAPSHOT>>(other, static_cast<const W*>(w), chunk.size, mask);
      }
      return;
    }
    const double* own = static_cast<const double*>(tensors.data[kTensorScale][chunk.tensor]);
    const S scale = perturb_scale<S>(row, kShape, norm, own == nullptr ? 1.0 : *own);
    const auto shape = make_shape<kShape, S>(p.scalars);
    const auto round = make_rounding<kHasMasks, kRounding>(p, chunk);
    using Shape = std::remove_const_t<decltype(shape)>;
    if (is_fisher) {
      if constexpr (kShape == SAMK_LINEAR) {
        // Roots and quotients take registers too, and beside the words of a mask there are none to spare.
        constexpr int kFewer = kHasMasks ? 1 : kUnroll;
        const Fisher<S> metric{static_cast<S>(row[SAMK_ETA])};
        perturb_chunk<kFewer>(w, g, other, chunk.size, mask,
                              Perturb<S, Fisher<S>, Shape>{scale, metric, shape}, round);
      }
    } else if (row[SAMK_METRIC] == SAMK_ADAPTIVE) {
      const Adaptive<S> metric{static_cast<S>(row[SAMK_ETA])};
      perturb_chunk<kUnroll>(w, g, other, chunk.size, mask,
                             Perturb<S, Adaptive<S>, Shape>{scale, metric, shape}, round);
    } else {
      perturb_chunk<kUnroll>(w, g, other, chunk.size, mask, Perturb<S, Euclidean, Shape>{scale, {}, shape},
                             round);
    }
  });
}

}  // namespace
}  // namespace samk

extern "C" int samk_perturb(const samk_plan* plan, const samk_perturb_args* a) {
  using namespace samk;
  const bool has_masters = a->masters.data != nullptr;
  const Scalars scalars{a->table, a->peak, a->norm, a->q, a->seed, a->step};
  if (a->number != nullptr && (has_masters || a->params.dtype != SAMK_BF16)) {
    return fail("perturb_: stochastic rounding is for bf16 weights without masters");
  }
  const Site site{"perturb_", *plan, a->row, nullptr, a->queue.device, a->queue.stream};
  const auto run = [&](auto kernel, int blocks) {
    return launch(site, kernel, blocks, scalars, [&](int list, int32_t t) -> void* {
      if (list == kParams) return at(a->params, t);
      if (list == kGrads) return at(a->grads, t);
      if (list == kOthers) return at(has_masters ? a->masters : a->snapshots, t);
      if (list == kMasks && a->masks.data != nullptr) return at(a->masks, t);
      if (list >= kMasks) return reinterpret_cast<void*>(static_cast<uintptr_t>(a->number[t]));
      return a->tensor_scale == nullptr ? nullptr : const_cast<double*>(a->tensor_scale + t);
    });
  };
  const auto masked = [&](auto w, auto g, auto* other, auto masks, auto rounding) {
    using W = decltype(w);
    using G = decltype(g);
    using Other = std::remove_pointer_t<decltype(other)>;
    constexpr bool kHas = decltype(masks)::value;
    constexpr int kHow = decltype(rounding)::value;
    switch (a->shape) {
      case SAMK_SIGN:
        return run(perturb_kernel<W, G, Other, SAMK_SIGN, kHas, kHow>, kBlocks<W, SAMK_SIGN, kHow>);
      case SAMK_POWERED:
        return run(perturb_kernel<W, G, Other, SAMK_POWERED, kHas, kHow>, kBlocks<W, SAMK_POWERED, kHow>);
      default:
        return run(perturb_kernel<W, G, Other, SAMK_LINEAR, kHas, kHow>, kBlocks<W, SAMK_LINEAR, kHow>);
    }
  };
  const auto rounded = [&](auto w, auto g, auto* other, auto rounding) {
    return a->masks.data == nullptr ? masked(w, g, other, std::false_type{}, rounding)
                                    : masked(w, g, other, std::true_type{}, rounding);
  };
  using ToNearest = std::integral_constant<int, kNearest>;
  const auto shaped = [&](auto w, auto g, auto* other) { return rounded(w, g, other, ToNearest{}); };
  if (has_masters) {
    return with_masters("perturb_", a->params.dtype, a->grads.dtype, a->masters.dtype,
                        [&](auto w) { return shaped(w, w, static_cast<const float*>(nullptr)); });
  }
  if (a->snapshots.dtype != a->params.dtype) return fail("perturb_: weights and snapshots differ in dtype");
  if (a->number != nullptr) {
    if (a->grads.dtype != SAMK_BF16) return fail("perturb_: stochastic rounding takes bf16 gradients");
    return rounded(bf16{}, bf16{}, static_cast<bf16*>(nullptr), std::integral_constant<int, kAtRandom>{});
  }
  return with_dtypes("perturb_", a->params.dtype, a->grads.dtype,
                     [&](auto w, auto g) { return shaped(w, g, static_cast<decltype(w)*>(nullptr)); });
}
