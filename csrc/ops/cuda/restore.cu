#include "engine/launch.cuh"
#include "engine/masked.cuh"

namespace samk {
namespace {

enum List { kParams, kSnapshots, kMasks };

struct Scalars {};

template <bool kHasMasks>
using P = Parameters<kMasks + kHasMasks, Scalars>;

// Bits, not numbers: any type of that size.
template <class T, bool kHasMasks>
__global__ void __launch_bounds__(kThreads, SAMK_COPY_BLOCKS)
    restore_kernel(const __grid_constant__ P<kHasMasks> p) {
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    T* w = element<T>(p.tensors, kParams, chunk);
    const T* s = element<const T>(p.tensors, kSnapshots, chunk);
    if (w == nullptr || s == nullptr) return;
    copy_chunk<kReaderOf<SAMK_STREAM_WEIGHTS>>(w, s, chunk.size,
                                               find_mask<MaskOf<kHasMasks>>(p.tensors, kMasks, chunk));
  });
}

// w = round(master).
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) round_kernel(const __grid_constant__ P<false> p) {
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    W* w = element<W>(p.tensors, kParams, chunk);
    const float* master = element<const float>(p.tensors, kSnapshots, chunk);
    if (w == nullptr || master == nullptr) return;
    sweep<pack_width<W>(), 2>(
        chunk.size, are_aligned(w, master), [&](int i, auto access) { return access.get(master + i); },
        [&](int i, const auto& x, auto access) {
          Raw<W, decltype(access)::kWidth> rounded;
#pragma unroll
          for (int k = 0; k < decltype(access)::kWidth; ++k) rounded.v[k] = narrow<W>(Lane<float>(x.v[k]));
          access.template put<kReaderOf<SAMK_STREAM_WEIGHTS>>(w + i, rounded);
        });
  });
}

}  // namespace

// Every source is compiled for the same targets, so one kernel speaks for all.
cudaError_t find_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, restore_kernel<uint32_t, false>);
}

}  // namespace samk

extern "C" int samk_restore(const samk_plan* plan, const samk_restore_args* a) {
  using namespace samk;
  const Site site{"restore_", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  if (a->masters.data != nullptr) {
    // Masters are whole, and weights that were not perturbed are the rounded masters: no mask is asked.
    return with_masters("restore_", a->params.dtype, a->params.dtype, a->masters.dtype, [&](auto w) {
      return launch(site, round_kernel<decltype(w)>, kBlocksPerSm, Scalars{},
                    [&](int list, int32_t t) { return at(list == kParams ? a->params : a->masters, t); });
    });
  }
  if (a->params.dtype != a->snapshots.dtype) return fail("restore_: weights and snapshots differ in dtype");
  const auto run = [&](auto kernel) {
    return launch(site, kernel, SAMK_COPY_BLOCKS, Scalars{}, [&](int list, int32_t t) {
      return at(list == kParams ? a->params : list == kSnapshots ? a->snapshots : a->masks, t);
    });
  };
  const auto typed = [&](auto bits) {
    using T = decltype(bits);
    return a->masks.data == nullptr ? run(restore_kernel<T, false>) : run(restore_kernel<T, true>);
  };
  switch (a->params.dtype) {
    case SAMK_F64:
      return typed(uint64_t{});
    case SAMK_F32:
      return typed(uint32_t{});
    default:
      return typed(uint16_t{});
  }
}
