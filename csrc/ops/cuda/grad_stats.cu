#include "engine/cuda.cuh"
#include "engine/launch.cuh"

namespace samk {
namespace {

constexpr int kMaxLists = 3, kPerTensor = kMaxLists;

struct Scalars {
  double* out;
  double* partials;
  unsigned* counter;
};

using P = Parameters<kMaxLists + 1, Scalars>;  // lists, then where the dots of a tensor go

// Six sums in fp64 beside twelve numbers read ahead: three blocks, which have 72 KB under way, spare a spill.
template <class T, int kLists>
constexpr int kBlocks = kLists == 3 && std::is_same<T, double>::value ? kBlocksPerSmMiddle : kBlocksPerSm;

template <class T, int kLists>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kLists>)
    grad_stats_kernel(const __grid_constant__ P p) {
  using V = Lane<typename Stored<T>::S>;
  constexpr int kDots = kLists * (kLists + 1) / 2;
  constexpr int kWidth = pack_width<T>();
  const auto& tensors = p.tensors;
  BlockSum<kDots> join;
  for_each_chunk<Order::kForward>(tensors, [&](const Chunk& chunk) {
    const T* x[kLists];
    uintptr_t bits = 0;
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      x[l] = element<const T>(tensors, l, chunk);
      bits |= reinterpret_cast<uintptr_t>(x[l]);
    }
    V dots[kDots];
#pragma unroll
    for (V& dot : dots) dot = V(0);
    if (bits != 0 && chunk.size > 0) {
      // A tensor that a list lacks reads as zero; the test is the same for every thread.
      const auto load = [&](int i, auto access) {
        struct {
          Raw<T, decltype(access)::kWidth> list[kLists];
        } all;
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
          all.list[l] = x[l] == nullptr ? Raw<T, decltype(access)::kWidth>{} : access.get(x[l] + i);
        }
        return all;
      };
      sweep_in_order<kWidth, kLists == 1 ? 4 : 2>(
          chunk.size, bits % 16 == 0, load, [&](int, const auto& all, auto access) {
#pragma unroll
            for (int k = 0; k < decltype(access)::kWidth; ++k) {
              int dot = 0;
#pragma unroll
              for (int a = 0; a < kLists; ++a) {
#pragma unroll
                for (int b = a; b < kLists; ++b, ++dot) {
                  // A missing partner must not turn a NaN or an infinity into a NaN: that dot has no such
                  // tensor.
                  if (x[a] == nullptr || x[b] == nullptr) continue;
                  dots[dot] = dots[dot] + widen(all.list[a].v[k]) * widen(all.list[b].v[k]);
                }
              }
            }
          });
    }
    double sums[kDots];
#pragma unroll
    for (int d = 0; d < kDots; ++d) sums[d] = dots[d].x;
    join(sums, Add{});
    if (threadIdx.x == 0) {
      for (int d = 0; d < kDots; ++d)
        p.scalars.partials[(tensors.first_chunk + chunk.index) * int64_t{kDots} + d] = sums[d];
    }
  });
  if (!is_last_block(p.scalars.counter)) return;

  // Every launch closes the dots of its own tensors, a warp for each; the last one also those of all.
  const int full = tensors.first_full[tensors.count];
  const double* const partials = p.scalars.partials + tensors.first_chunk * int64_t{kDots};
  const int lane = threadIdx.x % kWarp;
  for (int t = threadIdx.x / kWarp; t < tensors.count; t += kWarps) {
    double* const own = static_cast<double*>(tensors.data[kPerTensor][t]);
    if (own == nullptr) break;  // all tensors have one, or none
    for (int d = 0; d < kDots; ++d) {
      double sum = lane == 0 ? __ldcg(partials + (full + t) * int64_t{kDots} + d) : 0;
      for (int c = tensors.first_full[t] + lane; c < tensors.first_full[t + 1]; c += kWarp)
        sum += __ldcg(partials + c * int64_t{kDots} + d);
      sum = join_warp(sum, Add{});
      if (lane == 0) own[d] = sum;
    }
  }
  if (!tensors.is_last) return;
  const int chunks = tensors.first_chunk + full + tensors.count;
  double sums[kDots] = {};
  for (int c = threadIdx.x; c < chunks; c += kThreads) {
#pragma unroll
    for (int d = 0; d < kDots; ++d) sums[d] += __ldcg(p.scalars.partials + c * int64_t{kDots} + d);
  }
  join(sums, Add{});
  if (threadIdx.x == 0) {
    for (int d = 0; d < kDots; ++d) p.scalars.out[d] = sums[d];
  }
}

}  // namespace
}  // namespace samk

extern "C" int samk_grad_stats(const samk_plan* plan, const samk_grad_stats_args* a) {
  using namespace samk;
  if (a->lists < 1 || a->lists > kMaxLists) return fail("grad_stats: expected one to three lists");
  if (a->workspace == nullptr) return fail("grad_stats: a workspace is needed");
  for (int l = 1; l < a->lists; ++l) {
    if (a->list[l].dtype != a->list[0].dtype) return fail("grad_stats: the lists differ in dtype");
  }
  const Workspace workspace(a->workspace);
  const Scalars scalars{a->out, workspace.partials, workspace.counter};
  const Site site{"grad_stats", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  const int dots = a->lists * (a->lists + 1) / 2;
  if (plan->launches.count() == 0) return clear(site, a->out, dots);
  return with_dtype("grad_stats", a->list[0].dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int blocks) {
      return launch(site, kernel, blocks, scalars, [&](int list, int32_t t) -> void* {
        if (list != kPerTensor) return list < a->lists ? at(a->list[list], t) : nullptr;
        return a->per_tensor == nullptr ? nullptr : a->per_tensor + int64_t{t} * dots;
      });
    };
    if (a->lists == 1) return run(grad_stats_kernel<T, 1>, kBlocks<T, 1>);
    if (a->lists == 2) return run(grad_stats_kernel<T, 2>, kBlocks<T, 2>);
    return run(grad_stats_kernel<T, 3>, kBlocks<T, 3>);
  });
}
