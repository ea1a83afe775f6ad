#include "ops/cuda/ranks.cuh"

namespace samk {
namespace {

using namespace ranks;

constexpr unsigned kAllLanes = 0xffffffffu;

struct MarkScalars {
  Scalars ranks;
  int32_t threshold, shift, add;
  int64_t* candidates;  // NULL where none are wanted
  uint64_t capacity;
  unsigned long long* found;
};

using P = Parameters<kLists, MarkScalars>;

// Which elements of a pack rank above the threshold, and which at it: bit k for element k. The tensor goes on
// for so many elements.
struct Marks {
  unsigned higher, equal;
};
template <int kPack>
__device__ __forceinline__ Marks compare(const Ranks<kPack>& rank, Word word, int left,
                                         const MarkScalars& scalars) {
  Marks marks{0, 0};
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const int top = rank.v[k] >> scalars.shift;
    if (!word.has(k) || k >= left) continue;
    if (top > scalars.threshold) marks.higher |= 1u << k;
    if (top == scalars.threshold) marks.equal |= 1u << k;
  }
  return marks;
}

// Lanes that share a word join their bits, and the first of them writes it.
template <int kWidth>
__device__ __forceinline__ void put_word(uint64_t* words, unsigned higher, int i, int n, bool add) {
  constexpr int kSharers = kWordBits / kWidth;
  uint64_t bits = uint64_t{higher} << (i % kWordBits);
#pragma unroll
  for (int offset = kSharers / 2; offset > 0; offset /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, offset);
  if (i >= n || threadIdx.x % kSharers != 0) return;
  uint64_t& word = words[i / kWordBits];
  word = add ? word | bits : bits;
}

// Appends the candidates of a warp with one addition to *found: thousands of lanes would queue for it.
template <int kPack>
__device__ __forceinline__ void append(const Ranks<kPack>& rank, unsigned equal, int64_t position,
                                       const MarkScalars& scalars) {
  const int lane = threadIdx.x % kWarp;
  unsigned lanes[kPack];
  int total = 0;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    lanes[k] = __ballot_sync(kAllLanes, static_cast<int>(equal >> k & 1u));
    total += __popc(lanes[k]);
  }
  if (total == 0) return;
  unsigned long long at = 0;
  if (lane == 0) at = atomicAdd(scalars.found, static_cast<unsigned long long>(total));
  at = __shfl_sync(kAllLanes, at, 0);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const unsigned long long own = at + __popc(lanes[k] & ((1u << lane) - 1));
    if ((equal >> k & 1u) != 0 && own < scalars.capacity) {
      scalars.candidates[own] = candidate_of(rank.v[k], scalars.shift, position + k);
    }
    at += __popc(lanes[k]);
  }
}

// The elements at i, those of a pack that reaches over the end one by one.
template <class Source>
__device__ __forceinline__ auto load(const Source& source, int i, int n, Word word, bool is_aligned) {
  constexpr int kWidth = Source::kWidth;
  if (is_aligned && i + kWidth <= n) return source.load(i, word, Access<kWidth, true>{});
  decltype(source.load(i, word, Access<kWidth, true>{})) x{};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (i + k < n) x.v[k] = source.load(i + k, word, Access<1, true>{}).v[0];
  }
  return x;
}

// All threads of a block go as far as its longest, since lanes need each other.
template <class Source>
__device__ __forceinline__ void mark_chunk(const Source& source, const Mask& part, uint64_t* words, int n,
                                           int64_t position, const MarkScalars& scalars) {
  constexpr int kWidth = Source::kWidth, kStride = kThreads * kWidth;
  constexpr int kPacks = kBytesInFlight / (kBlocksPerSm * kThreads * 16), kUnroll = kPacks < 1 ? 1 : kPacks;
  const bool is_aligned = source.is_aligned();
#pragma unroll 1
  for (int first = 0; first < n; first += kUnroll * kStride) {
    Word word[kUnroll];
    decltype(load(source, 0, 0, Word{}, true)) loaded[kUnroll];
    const int i = first + static_cast<int>(threadIdx.x) * kWidth;
    const WordReader<kStride> at(part, i);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) word[u] = at.of_pack(i + u * kStride < n ? at.read(u) : 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(source, i + u * kStride, n, word[u], is_aligned);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStride >= n) break;
      const int own = i + u * kStride;
      const auto rank = source.rank(own, loaded[u]);
      const Marks marks = compare(rank, word[u], n - own, scalars);
      put_word<kWidth>(words, marks.higher, own, n, scalars.add != 0);
      if (scalars.candidates != nullptr) append(rank, marks.equal, position + own, scalars);
    }
  }
}

template <class Source>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) mark_kernel(const __grid_constant__ P p) {
  const auto& tensors = p.tensors;
  for_each_chunk<Order::kForward>(tensors, [&](const Chunk& chunk) {
    uint64_t* const words = static_cast<uint64_t*>(tensors.data[kMasks][chunk.tensor]);
    if (words == nullptr) return;
    const int64_t position =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensors.data[kPosition][chunk.tensor]));
    mark_chunk(Source(p.scalars.ranks, tensors, chunk), find_part(p.scalars.ranks, tensors, chunk),
               words + chunk.begin / kWordBits, chunk.size, position + chunk.begin, p.scalars);
  });
}

}  // namespace
}  // namespace samk

extern "C" int samk_mark(const samk_plan* plan, const samk_mark_args* a) {
  using namespace samk;
  const bool wants = a->candidates != nullptr;
  if (a->shift < 0 || a->shift > 31) return fail("mark_: expected a shift of 0 to 31");
  if (wants && (a->position == nullptr || a->found == nullptr)) {
    return fail("mark_: candidates need the position of every tensor and a counter");
  }
  const MarkScalars scalars{ranks::scalars_of(a->ranks),
                            a->threshold,
                            a->shift,
                            a->add,
                            a->candidates,
                            static_cast<uint64_t>(a->capacity),
                            reinterpret_cast<unsigned long long*>(a->found)};
  const Site site{"mark_", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  return ranks::with_ranks("mark_", a->ranks, [&](auto type) {
    return launch(site, mark_kernel<typename decltype(type)::type>, kBlocksPerSm, scalars,
                  [&](int list, int32_t t) -> void* {
                    if (list != ranks::kPosition) return ranks::pointer_of(a->ranks, a->masks, list, t);
                    return wants ? ranks::as_address(a->position[t]) : nullptr;
                  });
  });
}
