// Loops of the CUDA engine: chunks over blocks, 16-byte packs over threads, sums in a fixed order. Knows no
// optimizer. The same source runs on the CPU in the tests, see csrc/tests/shim.
#ifndef SAM_KERNELS_ENGINE_CUDA_CUH_
#define SAM_KERNELS_ENGINE_CUDA_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/lane.h"
#include "engine/parameters.cuh"

namespace samk {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

constexpr int kBytesInFlight = SAMK_BYTES_IN_FLIGHT;

enum class Order { kForward, kBackward };

template <int kIsBackward>
constexpr Order kOrderOf = kIsBackward ? Order::kBackward : Order::kForward;

// Who reads next what is stored: somebody soon, or nobody before much else has been.
enum class Reader { kSoon, kLate };

template <int kStreams>
constexpr Reader kReaderOf = kStreams ? Reader::kLate : Reader::kSoon;

struct Chunk {
  int tensor;
  int index;  // among the chunks of this launch
  int size;
  int64_t begin;
};

// The chunk with this number: whole chunks by their prefix sum, tails by their own number.
template <int kLists>
__device__ __forceinline__ Chunk find_chunk(const Tensors<kLists>& tensors, int index) {
  const int full = tensors.first_full[tensors.count];
  if (index >= full) {
    const int t = index - full;
    const int64_t before = tensors.first_full[t + 1] - tensors.first_full[t];
    return {t, index, tensors.tail[t], before * tensors.chunk};
  }
  int low = 0, high = tensors.count;  // first_full[low] <= index < first_full[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tensors.first_full[middle] <= index ? low : high) = middle;
  }
  return {low, index, tensors.chunk, static_cast<int64_t>(index - tensors.first_full[low]) * tensors.chunk};
}

// Calls body(chunk) for every chunk that is this block's by its number. A pass that reads what the pass
// before it read goes backward: what was read last is still in the cache.
template <Order kOrder, int kLists, class Body>
__device__ __forceinline__ void for_each_chunk(const Tensors<kLists>& tensors, Body body) {
  const int chunks = tensors.first_full[tensors.count] + tensors.count;
  for (int i = blockIdx.x; i < chunks; i += gridDim.x) {
    body(find_chunk(tensors, kOrder == Order::kForward ? i : chunks - 1 - i));
  }
}

template <class T, int kLists>
__device__ __forceinline__ T* element(const Tensors<kLists>& tensors, int list, const Chunk& chunk) {
  T* const data = static_cast<T*>(tensors.data[list][chunk.tensor]);
  return data == nullptr ? nullptr : data + chunk.begin;
}

template <int kLists>
__device__ __forceinline__ bool has(const Tensors<kLists>& tensors, int list, int tensor) {
  return tensors.data[list][tensor] != nullptr;
}

// ---- memory ----------------------------------------------------------------------------------------

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Raw {
  T v[kWidth];
};

// Stores a pack with the hint that it is not read soon. Single elements have none: a tail is not worth it.
template <class T, int kWidth>
__device__ __forceinline__ void stream(T* p, const Raw<T, kWidth>& x) {
  if constexpr (sizeof(x) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(x)) / 16; ++k) {
      uint4 bits;
      memcpy(&bits, &x.v[k * 16 / sizeof(T)], sizeof bits);
      __stcs(reinterpret_cast<uint4*>(p) + k, bits);
    }
  } else {
    *reinterpret_cast<Raw<T, kWidth>*>(p) = x;
  }
}

// How the elements of one pack are reached: 16 bytes at a time, or one by one where an address is not
// aligned.
template <int kWidth_, bool kAligned>
struct Access {
  static constexpr int kWidth = kWidth_;
  template <class T>
  __device__ __forceinline__ Raw<T, kWidth> get(const T* p) const {
    if constexpr (kAligned) {
      return *reinterpret_cast<const Raw<T, kWidth>*>(p);
    } else {
      Raw<T, kWidth> x;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x.v[k] = p[k];
      return x;
    }
  }
  template <Reader kReader = Reader::kSoon, class T>
  __device__ __forceinline__ void put(T* p, const Raw<T, kWidth>& x) const {
    if constexpr (kAligned && kReader == Reader::kLate) {
      stream(p, x);
    } else if constexpr (kAligned) {
      *reinterpret_cast<Raw<T, kWidth>*>(p) = x;
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) p[k] = x.v[k];
    }
  }
};

// One element of a pack as a number to calculate with, and back.
template <class T>
__device__ __forceinline__ auto widen(T x) {
  return Lane<typename Stored<T>::S>(Stored<T>::widen(x));
}
template <class T, class S>
__device__ __forceinline__ T narrow(Lane<S> x) {
  return Stored<T>::narrow(static_cast<typename Stored<T>::S>(x.x));
}

// Elements a thread moves at a time: 16 bytes of the narrowest of these types.
template <class... Ts>
__host__ __device__ constexpr int pack_width() {
  constexpr int sizes[] = {static_cast<int>(sizeof(Ts))...};
  int narrowest = 16;
  for (int size : sizes) narrowest = size < narrowest ? size : narrowest;
  return 16 / narrowest;
}

template <class... Ts>
__device__ __forceinline__ bool are_aligned(const Ts*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// For the packs between first and end, all of them whole: finish(i, load(i, access), access), with the loads
// of kUnroll packs before the first store, so that enough bytes are in flight.
template <int kUnroll, class Load, class Finish, class A>
__device__ __forceinline__ void sweep_packs(int first, int end, const Load& load, const Finish& finish,
                                            A access) {
  constexpr int kStride = kThreads * A::kWidth;
  int i = first + static_cast<int>(threadIdx.x) * A::kWidth;
  for (; i + (kUnroll - 1) * kStride < end; i += kUnroll * kStride) {
    decltype(load(0, access)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(i + u * kStride, access);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) finish(i + u * kStride, loaded[u], access);
  }
  for (; i < end; i += kStride) finish(i, load(i, access), access);
}

// Every element of the chunk once, in packs; then the elements after the last whole pack, or all of them
// where an address is not aligned, one to a thread: a warp that wrote its packs element by element would
// touch every sector once for each element of a pack.
template <int kWidth, int kUnroll, class Load, class Finish>
__device__ __forceinline__ void sweep(int n, bool is_aligned, const Load& load, const Finish& finish) {
  constexpr int kLoose = kUnroll < 2 ? 4 : 2 * kUnroll;
  const int whole = is_aligned ? n / kWidth * kWidth : 0;
  sweep_packs<kUnroll>(0, whole, load, finish, Access<kWidth, true>{});
  sweep_packs<kLoose>(whole, n, load, finish, Access<1, true>{});
}

// The same for sums, which must not depend on addresses: a thread meets the same elements in the same order
// wherever they are. They only read, and what a warp leaves of a sector is in the L1 cache when it comes
// back.
template <int kWidth, int kUnroll, class Load, class Add>
__device__ __forceinline__ void sweep_in_order(int n, bool is_aligned, const Load& load, const Add& add) {
  const int whole = n / kWidth * kWidth;
  if (is_aligned) {
    sweep_packs<kUnroll>(0, whole, load, add, Access<kWidth, true>{});
  } else {
    sweep_packs<kUnroll>(0, whole, load, add, Access<kWidth, false>{});
  }
  const int i = whole + static_cast<int>(threadIdx.x);
  if (i < n) add(i, load(i, Access<1, true>{}), Access<1, true>{});
}

template <Reader kReader, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int n) {
  sweep<pack_width<T>(), SAMK_COPY_LOADS>(
      n, are_aligned(to, from), [&](int i, auto access) { return access.get(from + i); },
      [&](int i, const auto& x, auto access) { access.template put<kReader>(to + i, x); });
}

// ---- sums ------------------------------------------------------------------------------------------

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// Joins one double of every thread of a warp, in a fixed order; the result is lane 0's alone.
template <class Join>
__device__ __forceinline__ double join_warp(double x, Join join) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = join(x, __shfl_down_sync(0xffffffffu, x, offset));
  }
  return x;
}

// The same for a block; the result is thread 0's alone. Two sets of shared memory take turns: a block passes
// one barrier per call, and none may still read what the next call writes.
template <int kSums>
class BlockSum {
 public:
  template <class Join>
  __device__ __forceinline__ void operator()(double (&x)[kSums], Join join) {
    __shared__ double parts[2][kSums][kWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      x[s] = join_warp(x[s], join);
      if (lane == 0) parts[turn_][s][warp] = x[s];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        x[s] = parts[turn_][s][0];
        for (int w = 1; w < kWarps; ++w) x[s] = join(x[s], parts[turn_][s][w]);
      }
    }
    turn_ ^= 1;
  }

 private:
  int turn_ = 0;
};

// Whether this block is the last of its launch to arrive here; it then sees what all others wrote. The
// counter is ready for the next launch.
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace samk

#endif  // SAM_KERNELS_ENGINE_CUDA_CUH_
