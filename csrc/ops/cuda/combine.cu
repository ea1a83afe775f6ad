#include "engine/cuda.cuh"
#include "engine/launch.cuh"
#include "math/combine.h"

namespace samk {
namespace {

constexpr int kMaxLists = 3, kMaxOuts = 2;

constexpr int kCoefficients = kMaxLists + kMaxOuts;

struct Scalars {
  int lists;
};

// Lists, then outputs, then every tensor's coefficients: a launch has its tensors in an order of its own.
using P = Parameters<kCoefficients + 1, Scalars>;

template <class T, int kOuts>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) combine_kernel(const __grid_constant__ P p) {
  using S = typename Stored<T>::S;
  using V = Lane<S>;
  const auto& tensors = p.tensors;
  for_each_chunk<Order::kForward>(tensors, [&](const Chunk& chunk) {
    const T* x[kMaxLists];
    T* out[kOuts];
    Term<S> term[kOuts][kMaxLists];
    bool reads[kMaxLists];
    uintptr_t bits = 0, outs = 0;
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      out[o] = element<T>(tensors, kMaxLists + o, chunk);
      outs |= reinterpret_cast<uintptr_t>(out[o]);
    }
    if (outs == 0) return;
    const double* coefficients = static_cast<const double*>(tensors.data[kCoefficients][chunk.tensor]);
#pragma unroll
    for (int l = 0; l < kMaxLists; ++l) {
      x[l] = l < p.scalars.lists ? element<const T>(tensors, l, chunk) : nullptr;
      bool is_read = false;
#pragma unroll
      for (int o = 0; o < kOuts; ++o) {
        const double c = x[l] == nullptr ? 0.0 : coefficients[o * p.scalars.lists + l];
        term[o][l].coefficient = static_cast<S>(c);
        is_read = is_read || (c != 0 && out[o] != nullptr);
      }
      reads[l] = is_read;
      if (is_read) bits |= reinterpret_cast<uintptr_t>(x[l]);
    }
    const auto load = [&](int i, auto access) {
      struct {
        Raw<T, decltype(access)::kWidth> list[kMaxLists];
      } all;
#pragma unroll
      for (int l = 0; l < kMaxLists; ++l) {
        all.list[l] = !reads[l] ? Raw<T, decltype(access)::kWidth>{} : access.get(x[l] + i);
      }
      return all;
    };
    sweep<pack_width<T>(), kOuts == 1 ? SAMK_COMBINE_LOADS : 1>(
        chunk.size, (bits | outs) % 16 == 0, load, [&](int i, const auto& all, auto access) {
#pragma unroll
          for (int o = 0; o < kOuts; ++o) {
            if (out[o] == nullptr) continue;
            Raw<T, decltype(access)::kWidth> y;
#pragma unroll
            for (int k = 0; k < decltype(access)::kWidth; ++k) {
              V sum(0);
              bool is_first = true;
#pragma unroll
              for (int l = 0; l < kMaxLists; ++l) {
                // A branch, not a product with zero: a list without a part may hold anything.
                if (!reads[l] || term[o][l].coefficient == S(0)) continue;
                const V element = widen(all.list[l].v[k]);
                sum = is_first ? term[o][l].first(element) : term[o][l].next(sum, element);
                is_first = false;
              }
              y.v[k] = narrow<T>(sum);
            }
            access.put(out[o] + i, y);
          }
        });
  });
}

}  // namespace
}  // namespace samk

extern "C" int samk_combine(const samk_plan* plan, const samk_combine_args* a) {
  using namespace samk;
  if (a->lists < 1 || a->lists > kMaxLists) return fail("combine_: expected one to three lists");
  if (a->outs < 1 || a->outs > kMaxOuts) return fail("combine_: expected one or two outputs");
  const int32_t dtype = a->list[0].dtype;
  for (int l = 1; l < a->lists; ++l) {
    if (a->list[l].dtype != dtype) return fail("combine_: the lists differ in dtype");
  }
  for (int o = 0; o < a->outs; ++o) {
    if (a->out[o].dtype != dtype) return fail("combine_: lists and outputs differ in dtype");
  }
  const Scalars scalars{a->lists};
  const int64_t block = a->per_tensor != 0 ? int64_t{a->outs} * a->lists : 0;
  const Site site{"combine_", *plan, nullptr, nullptr, a->queue.device, a->queue.stream};
  return with_dtype("combine_", dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel) {
      return launch(site, kernel, kBlocksPerSm, scalars, [&](int list, int32_t t) -> void* {
        if (list < kMaxLists) return list < a->lists ? at(a->list[list], t) : nullptr;
        if (list == kCoefficients) return const_cast<double*>(a->coefficients + t * block);
        return list - kMaxLists < a->outs ? at(a->out[list - kMaxLists], t) : nullptr;
      });
    };
    return a->outs == 1 ? run(combine_kernel<T, 1>) : run(combine_kernel<T, 2>);
  });
}
