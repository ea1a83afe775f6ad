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
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    restore_kernel(const __grid_constant__ P<kHasMasks> p) {
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    T* w = element<T>(p.tensors, kParams, chunk);
    const T* s = element<const T>(p.tensors, kSnapshots, chunk);
    if (w == nullptr || s == nullptr) return;
    copy_chunk(w, s, chunk.size, find_mask<MaskOf<kHasMasks>>(p.tensors, kMasks, chunk));
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
  if (a->params.dtype != a->snapshots.dtype) return fail("restore_: weights and snapshots differ in dtype");
  const auto run = [&](auto kernel) {
    return launch(site, kernel, kBlocksPerSm, Scalars{}, [&](int list, int32_t t) {
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
