#include "math/combine.h"

#include "engine/cpu.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

template <class T>
struct Sum {
  using S = typename Opmath<T>::S;
  const T* list[3];
  Term<S> term[3];
  int terms = 0;

  void add(const T* x, double coefficient) {
    if (x == nullptr || coefficient == 0) return;
    list[terms] = x;
    term[terms++] = {static_cast<S>(coefficient)};
  }

  // A loop over one to three terms costs nothing beside their reads.
  template <class Part>
  SAMK_INLINE auto at(int64_t i, Part part) const {
    using V = typename Opmath<T>::V;
    if (terms == 0) return V(S(0));
    V sum = term[0].first(part.get(list[0] + i));
    for (int k = 1; k < terms; ++k) sum = term[k].next(sum, part.get(list[k] + i));
    return sum;
  }
};

}  // namespace

int combine(const samk_plan& plan, const samk_combine_args& a) {
  if (a.lists < 1 || a.lists > 3) return fail("combine_: expected one to three lists");
  if (a.outs < 1 || a.outs > 2) return fail("combine_: expected one or two outputs");
  const int32_t dtype = a.list[0].dtype;
  for (int l = 0; l < a.lists; ++l) {
    if (check_one_dtype("combine_", dtype, a.list[l], a.out[a.outs - 1], a.out[0]) != 0) return 1;
  }
  const bool large = exceeds_cache(plan.chunks.total() * dtype_bytes(dtype) * (a.lists + a.outs));
  return with_dtype("combine_", dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
      Sum<T> sum[2];
      T* out[2] = {};
      int outs = 0;
      bool streaming = large;
      const int64_t block = a.per_tensor != 0 ? chunk.tensor * int64_t{a.outs} * a.lists : 0;
      for (int o = 0; o < a.outs; ++o) {
        T* const y = element<T>(a.out[o], chunk.tensor, chunk.begin);
        if (y == nullptr) continue;
        for (int l = 0; l < a.lists; ++l) {
          const T* x = element<T>(a.list[l], chunk.tensor, chunk.begin);
          sum[outs].add(x, a.coefficients[block + o * a.lists + l]);
          // What was just read is in the cache; writing around it would only cost.
          if (x == y) streaming = false;
        }
        streaming = streaming && can_stream(y);
        out[outs++] = y;
      }
      if (outs == 0) return;
      if (outs == 1) {
        sweep_streaming(chunk.size, streaming, [&](int64_t i, auto part, auto stream) {
          part.put(out[0] + i, sum[0].at(i, part), stream);
        });
        return;
      }
      sweep_streaming(chunk.size, streaming, [&](int64_t i, auto part, auto stream) {
        // Both sums before either store: an output may be one of the lists.
        const auto x = sum[0].at(i, part);
        const auto y = sum[1].at(i, part);
        part.put(out[0] + i, x, stream);
        part.put(out[1] + i, y, stream);
      });
    });
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
