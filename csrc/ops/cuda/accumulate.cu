#include "engine/cuda.cuh"
#include "engine/launch.cuh"
#include "math/rank.h"

namespace samk {
namespace {

enum List { kScores, kGrads, kLists };

struct Scalars {};

using P = Parameters<kLists, Scalars>;

template <class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) accumulate_kernel(const __grid_constant__ P p) {
  using V = Lane<float>;
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    float* scores = element<float>(p.tensors, kScores, chunk);
    const G* g = element<const G>(p.tensors, kGrads, chunk);
    if (scores == nullptr || g == nullptr) return;
    const auto load = [&](int i, auto access) {
      struct {
        Raw<float, decltype(access)::kWidth> score;
        Raw<G, decltype(access)::kWidth> g;
      } x;
      x.score = access.get(scores + i);
      x.g = access.get(g + i);
      return x;
    };
    sweep<pack_width<float, G>(), 2>(
        chunk.size, are_aligned(scores, g), load, [&](int i, const auto& x, auto access) {
          auto sum = x.score;
#pragma unroll
          for (int k = 0; k < decltype(access)::kWidth; ++k) {
            sum.v[k] = add_square(V(sum.v[k]), V(static_cast<float>(widen(x.g.v[k]).x))).x;
          }
          access.put(scores + i, sum);
        });
  });
}

}  // namespace
}  // namespace samk

extern "C" int samk_accumulate(const samk_plan* plan, const samk_accumulate_args* a) {
  using namespace samk;
  if (a->scores.data != nullptr && a->scores.dtype != SAMK_F32) {
    return fail("accumulate_: scores are fp32, and these are of dtype code " +
                std::to_string(a->scores.dtype));
  }
  const Site site{"accumulate_", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  return with_dtype("accumulate_", a->grads.dtype, [&](auto g) {
    return launch(site, accumulate_kernel<decltype(g)>, kBlocksPerSm, Scalars{},
                  [&](int list, int32_t t) { return at(list == kScores ? a->scores : a->grads, t); });
  });
}
