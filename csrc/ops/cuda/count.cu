#include "ops/cuda/ranks.cuh"

namespace samk {
namespace {

using namespace ranks;

constexpr int kMaxBits = 11;

struct CountScalars {
  Scalars ranks;
  int32_t prefix, shift, bits;
  unsigned long long* counts;
};

using P = Parameters<kMasks + 1, CountScalars>;

// A block counts in shared memory. 32 bits are enough: for more, one block would have to meet 2^32 elements,
// and a device that holds as many for each of its blocks does not exist.
template <class Source>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) count_kernel(const __grid_constant__ P p) {
  __shared__ unsigned own[1 << kMaxBits];
  unsigned* const counts = own;
  const int bins = 1 << p.scalars.bits, prefix = p.scalars.prefix;
  const int shift = p.scalars.shift, bits = p.scalars.bits;
  for (int b = threadIdx.x; b < bins; b += kThreads) counts[b] = 0;
  __syncthreads();
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    if (!has(p.tensors, kMasks, chunk.tensor)) return;
    const Source source(p.scalars.ranks, p.tensors, chunk);
    sweep<Source::kWidth, 2>(
        chunk.size, source.is_aligned(), find_part(p.scalars.ranks, p.tensors, chunk),
        [&](int i, Word word, auto access) { return source.load(i, word, access); },
        [&](int i, Word word, const auto& x, auto access) {
          if (word.is_empty()) return;
          const auto rank = source.rank(i, x);
#pragma unroll
          for (int k = 0; k < decltype(access)::kWidth; ++k) {
            const int top = rank.v[k] >> shift;
            if (word.has(k) && top >> bits == prefix) atomicAdd(counts + (top & (bins - 1)), 1u);
          }
        });
  });
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    if (counts[b] != 0) atomicAdd(p.scalars.counts + b, static_cast<unsigned long long>(counts[b]));
  }
}

}  // namespace
}  // namespace samk

extern "C" int samk_count(const samk_plan* plan, const samk_count_args* a) {
  using namespace samk;
  if (a->bits < 0 || a->bits > kMaxBits) return fail("count_ranks: expected 0 to 11 bits");
  if (a->shift < 0 || a->shift > 31) return fail("count_ranks: expected a shift of 0 to 31");
  const CountScalars scalars{ranks::scalars_of(a->ranks), a->prefix, a->shift, a->bits,
                             reinterpret_cast<unsigned long long*>(a->counts)};
  const Site site{"count_ranks", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  return ranks::with_ranks("count_ranks", a->ranks, [&](auto type) {
    return launch(site, count_kernel<typename decltype(type)::type>, kBlocksPerSm, scalars,
                  [&](int list, int32_t t) { return ranks::pointer_of(a->ranks, a->masks, list, t); });
  });
}
