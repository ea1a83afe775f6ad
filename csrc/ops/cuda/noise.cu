#include "engine/cuda.cuh"
#include "engine/launch.cuh"
#include "math/normal.h"
#include "math/random.h"

namespace samk {
namespace {

// A number is a whole number in the place of an address: it travels like any other list.
enum List { kOut, kNumber, kLists };

struct Scalars {
  uint64_t seed;
  uint32_t step;
};

using P = Parameters<kLists, Scalars>;

// What there is to read.
struct Nothing {};

// The normal numbers of one tensor. Elements that share a call of philox share it here where a pack holds all
// four; see note: [four neighbours].
class Numbers {
 public:
  __device__ __forceinline__ Numbers(const Scalars& scalars, const Tensors<kLists>& tensors,
                                     const Chunk& chunk)
      : seed_(scalars.seed),
        step_(scalars.step),
        number_(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(tensors.data[kNumber][chunk.tensor]))),
        begin_(chunk.begin) {}

  template <class T, int kWidth>
  __device__ __forceinline__ Raw<T, kWidth> at(int i) const {
    Raw<T, kWidth> x;
    if constexpr (kWidth % 4 == 0) {
#pragma unroll
      for (int k = 0; k < kWidth; k += 4) {
        const Words words = random_words(seed_, step_, number_, begin_ + i + k);
        const Point first = normal_pair(words.x0, words.x1), second = normal_pair(words.x2, words.x3);
        x.v[k] = narrow<T>(Lane<float>(first.x));
        x.v[k + 1] = narrow<T>(Lane<float>(first.y));
        x.v[k + 2] = narrow<T>(Lane<float>(second.x));
        x.v[k + 3] = narrow<T>(Lane<float>(second.y));
      }
    } else {
      static_assert(kWidth == 1, "a pack holds whole calls of philox, or one element");
      const int64_t own = begin_ + i;
      const Words words = random_words(seed_, step_, number_, own);
      const bool is_second = (own & 2) != 0;
      const Point pair = normal_pair(is_second ? words.x2 : words.x0, is_second ? words.x3 : words.x1);
      x.v[0] = narrow<T>(Lane<float>((own & 1) != 0 ? pair.y : pair.x));
    }
    return x;
  }

 private:
  uint64_t seed_;
  uint32_t step_, number_;
  int64_t begin_;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) noise_kernel(const __grid_constant__ P p) {
  constexpr int kWidth = pack_width<T>() < 4 ? 4 : pack_width<T>();
  for_each_chunk<Order::kForward>(p.tensors, [&](const Chunk& chunk) {
    T* out = element<T>(p.tensors, kOut, chunk);
    if (out == nullptr) return;
    const Numbers numbers(p.scalars, p.tensors, chunk);
    sweep<kWidth, 1>(
        chunk.size, are_aligned(out), [](int, auto) { return Nothing{}; },
        [&](int i, Nothing, auto access) {
          access.put(out + i, numbers.at<T, decltype(access)::kWidth>(i));
        });
  });
}

}  // namespace
}  // namespace samk

extern "C" int samk_noise(const samk_plan* plan, const samk_noise_args* a) {
  using namespace samk;
  if (a->number == nullptr) return fail("noise_: the number of every tensor is needed");
  const Scalars scalars{a->seed, a->step};
  const Site site{"noise_", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  return with_dtype("noise_", a->out.dtype, [&](auto type) {
    return launch(site, noise_kernel<decltype(type)>, kBlocksPerSm, scalars,
                  [&](int list, int32_t t) -> void* {
                    if (list == kOut) return at(a->out, t);
                    return reinterpret_cast<void*>(static_cast<uintptr_t>(a->number[t]));
                  });
  });
}
