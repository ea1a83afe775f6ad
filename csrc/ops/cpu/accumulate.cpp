#include "engine/cpu.h"
#include "math/rank.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {

// No streaming stores: scores are read first, and what was just read is in the cache.
int accumulate(const samk_plan& plan, const samk_accumulate_args& a) {
  if (check_one_dtype("accumulate_squares_", SAMK_F32, a.scores) != 0) return 1;
  return with_dtype("accumulate_squares_", a.grads.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
      float* score = element<float>(a.scores, chunk.tensor, chunk.begin);
      const T* g = element<T>(a.grads, chunk.tensor, chunk.begin);
      if (score == nullptr || g == nullptr) return;
      sweep(chunk.size, [&](int64_t i, auto part) {
        part.put(score + i, add_square(part.get(score + i), to_f32(part.get(g + i))));
      });
    });
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
